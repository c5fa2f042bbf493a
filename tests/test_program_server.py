"""Programs of the server end, print and die as those of an interpreter."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.forked_program import ForkedProgram
from tests.program_server import ProgramServer

#: What a program can find out about itself.
TELLING = """
  import atexit, json, os, random, signal, sys, threading
  import jax
  atexit.register(print, "at exit")
  spec = sys.modules["__main__"].__spec__
  print(json.dumps({
    "name": [__name__, spec.name],
    "argv": sys.argv,
    "path": sys.path[0],
    "cwd": os.getcwd(),
    # Imports, of which the server has made more, set others.
    "env": {k: os.environ.get(k) for k in sys.argv[2:]},
    "cache": jax.config.jax_compilation_cache_dir,
    "seconds": jax.config.jax_persistent_cache_min_compile_time_secs,
    "x64": jax.config.jax_enable_x64,
    "signals": [str(signal.getsignal(x)) for x in (2, 13, 15, 17)],
    "threads": threading.active_count(),
    "seekable": [sys.stdout.seekable(), sys.stderr.seekable()],
    "reconfigured": sys.stderr.reconfigure(errors="backslashreplace"),
    "encodings": [sys.stdout.encoding, sys.stderr.encoding],
    "devices": len(jax.devices()),
  }))
  print("an error", file=sys.stderr)
  sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def start(program_server, tmp_path):
  """Starts a program of this text, in a folder of its own."""

  def call(text, *arguments, env=None, interpreter=False):
    lines = [line[2:] for line in text.strip("\n").split("\n")]
    (tmp_path / "telling.py").write_text("\n".join(lines) + "\n")
    env = os.environ | (env or {})
    if not interpreter:
      process = program_server.start(
        "telling", *arguments, cwd=tmp_path, env=env
      )
      assert isinstance(process, ForkedProgram)
      return process
    return subprocess.Popen(
      [sys.executable, "-m", "telling", *arguments],
      cwd=tmp_path,
      env=env,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  return call


def test_a_program_is_as_in_an_interpreter_of_its_own(start, tmp_path):
  env = {
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    "JAX_ENABLE_X64": "true",
    "JAX_PLATFORMS": "cpu",
    "CRC32C_SW_MODE": "auto",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=3",
  }
  found = {}
  for interpreter in (False, True):
    arguments = ["7", *os.environ, *env, "\u20ac"]
    process = start(TELLING, *arguments, env=env, interpreter=interpreter)
    out, err = process.communicate(timeout=100)
    first, *rest = out.splitlines()
    found[interpreter] = (json.loads(first), rest, err, process.returncode)
  for name, value in found[True][0].items():
    assert found[False][0][name] == value, name
  assert found[False] == found[True]
  told, *others = found[False]
  assert others == [["at exit"], "an error\n", 7]
  assert env.items() <= told["env"].items()
  assert told["devices"] == 3 and told["x64"] and told["seconds"] == 0.5


@pytest.mark.parametrize(
  "text, status, last",
  [
    ("  pass", 0, None),
    ("  raise SystemExit('a message')", 1, "a message"),
    ("  raise ValueError('wrong')", 1, "ValueError: wrong"),
    ("  import os; os._exit(5)", 5, None),
    ("  import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9, None),
  ],
)
def test_the_end_of_a_program(start, text, status, last):
  process = start(text)
  out, err = process.communicate(timeout=100)
  assert (process.returncode, process.poll(), out) == (status, status, "")
  assert (err.splitlines() or [None])[-1] == last


def test_two_programs_at_once_and_a_signal_for_one(start):
  waiting = start("  import time; print(1, flush=True); time.sleep(100)")
  assert waiting.stdout.readline() == "1\n"
  other = start("  print(2)")
  assert other.communicate(timeout=100) == ("2\n", "")
  assert waiting.poll() is None
  with pytest.raises(subprocess.TimeoutExpired):
    waiting.wait(timeout=0.01)
  with pytest.raises(subprocess.TimeoutExpired):
    waiting.communicate(timeout=0.01)
  # Not SIGINT, to which a shell makes deaf what it puts into the background.
  waiting.send_signal(signal.SIGTERM)
  assert waiting.communicate(timeout=100) == ("", "")
  assert waiting.returncode == -signal.SIGTERM


def test_no_two_programs_have_the_same_random_numbers(start):
  text = "  import random, numpy; print(random.random(), numpy.random.rand())"
  first, second = (start(text).communicate(timeout=100)[0] for _ in range(2))
  assert set(first.split()).isdisjoint(second.split())


@pytest.mark.parametrize("change", [{"PYTHONIOENCODING": "latin-1"}, {}])
def test_what_only_an_interpreter_can_be_given(program_server, change):
  env = {k: v for k, v in os.environ.items() if change or k != "PATH"}
  process = program_server.start("this", env=env | change)
  assert isinstance(process, subprocess.Popen)
  assert process.communicate(timeout=100)[0].startswith("The Zen of Python")


def test_the_server_has_one_thread_and_ends_with_its_context():
  with ProgramServer() as server:
    process = server.start("this")
    assert process.communicate(timeout=100)[0].startswith("The Zen of Python")
    assert isinstance(process, ForkedProgram)
    assert server.threads() == 1
