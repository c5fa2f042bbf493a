"""Real programs as subprocesses, on a tiny text, with one compile cache."""

import os
import pathlib
import random
import subprocess

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = ROOT / "tests" / "experiments" / "micro.py"


@pytest.fixture(scope="module")
def steps_compile_fast():
  """The tests' own process compiles as programs do: few steps are taken."""
  name = "jax_disable_most_optimizations"
  before = jax.config.read(name)
  jax.config.update(name, True)
  yield
  jax.config.update(name, before)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
  """Thirty small documents of random words."""
  folder = tmp_path_factory.mktemp("text")
  rng = random.Random(0)
  words = ["memory", "expert", "token", "gate", "row", "hash", "the", "of"]
  for i in range(30):
    text = " ".join(rng.choice(words) for _ in range(120))
    (folder / f"document{i}.txt").write_text(text + "\n")
  return folder


@pytest.fixture(scope="session")
def program(text_folder, tmp_path_factory, program_server):
  """A function that starts a program and waits for it, or returns the process.

  The programs share prepared data and JAX's compilation cache, which changes no
  result: a second start takes what the first compiled.
  """
  shared = tmp_path_factory.mktemp("shared")

  def run(name, *arguments, wait=True, configured=True, env=None):
    if configured:
      arguments = (
        f"--config={CONFIG}",
        f"--config.data.folder={text_folder}",
        f"--config.data.data_dir={shared / 'data'}",
        *arguments,
      )
    process = program_server.start(
      f"experiments.{name}",
      *map(str, arguments),
      env=os.environ
      | {
        "JAX_COMPILATION_CACHE_DIR": str(shared / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **(env or {}),
      },
    )
    if not wait:
      return process
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(
      process.args, process.returncode, out, err
    )

  return run
