"""The training step compiled ahead of time, for devices that are not here."""

import importlib.metadata
import json
import os
import subprocess
import sys

import jax
import pytest

from engram_jax.errors import InputError
from engram_jax.run_config import MeshConfig
from experiments import compile_for_pod

SIZES = (
  "--config.train.batch_size=8",
  "--config.mesh.expert=2",
  "--config.mesh.lookup=exchange",
)


@pytest.fixture(scope="module")
def compiled(program, tmp_path_factory):
  """What the program says and writes, for eight simulated devices."""
  out = tmp_path_factory.mktemp("compiled") / "result.json"
  arguments = ("--topology=cpu:8", "--without_memory", f"--out={out}", *SIZES)
  done = program("compile_for_pod", *arguments)
  assert done.returncode == 0, done.stderr
  return json.loads(out.read_text()), done.stdout


def test_compiles_with_and_without_the_memory(compiled):
  result, _ = compiled
  assert result["mesh"] == {"data": 4, "expert": 2, "tensor": 1}
  memory, plain = result["programs"].values()
  assert memory["fits"] and plain["fits"]
  assert memory["parameters"]["tables"] > plain["parameters"]["tables"] == 0
  # A table and its two moments, an eighth of them on each device.
  assert memory["state_bytes"]["tables"] * 8 >= 400 * 4 * 4
  assert (
    memory["state_bytes"]["table_states"]
    >= 2 * memory["state_bytes"]["tables"]
    > 0
  )
  assert memory["memory"]["alias"] >= sum(memory["state_bytes"].values())
  assert plain["lookup_capacity"] is None


def test_sends_rows_and_no_table(compiled):
  result, _ = compiled
  memory, plain = result["programs"].values()
  sent = memory["collectives"]
  assert sent["of_tables"] == memory["copies_of_tables"] == []
  assert sent["largest"][0]["bytes"] >= sent["largest"][-1]["bytes"]
  # Ids, rows and gradients of rows, besides the experts' tokens.
  others = plain["collectives"]["operations"]["all-to-all"]
  assert sent["operations"]["all-to-all"] == others + 3


def test_prints_a_table(compiled):
  _, printed = compiled
  for words in (
    "cpu:8: 8 devices, mesh data 4, expert 2, tensor 1",
    "with memory",
    "without",
    "of them in tables",
    "all-to-all",
    "largest array params/",
    "largest collective: ",
    "0 sent between devices, 0 copied within one",
  ):
    assert words in printed


def test_a_mesh_that_does_not_fit_is_one_line(program):
  done = program("compile_for_pod", "--topology=cpu:8", "--config.mesh.data=3")
  assert done.returncode == 2
  (line,) = done.stderr.strip().splitlines()
  name = "mesh.data * mesh.expert * mesh.tensor"
  assert line.startswith(f"error: {name}: 3; valid: the number of devices, 8")


@pytest.mark.parametrize(
  "topology, valid",
  [
    ("v9z:2x2", "cpu:N, or one of v4:SHAPE"),
    ("v5p", "cpu:N, or one of v4:SHAPE"),
    ("cpu:one", "cpu:N with N of 2 or more"),
    ("cpu:1", "cpu:N with N of 2 or more"),
  ],
)
def test_refuses_topologies_that_there_are_not(topology, valid):
  with pytest.raises(
    InputError, match=f"^topology: {topology}; valid: {valid}"
  ):
    compile_for_pod.devices_of(topology)


def test_says_that_libtpu_is_missing(monkeypatch):
  def version(name):
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, "version", version)
  with pytest.raises(InputError, match="without libtpu; valid: cpu:N; for a"):
    compile_for_pod.devices_of("v5p:4x4x8")


def test_refuses_a_single_device():
  with pytest.raises(InputError, match=r"^topology: one device; valid: two"):
    compile_for_pod.make_mesh(MeshConfig(), jax.devices()[:1])


def test_says_what_does_not_fit():
  program = {
    "fits": False,
    "refusal": "Ran out of memory on HBM",
    "parameters": {"total": 5, "tables": 3, "activated": 1},
    "state_bytes": {"params": 2**30, "tables": 9 * 2**30},
    "largest_arrays": {"tables/1": 5 * 2**30, "tables/2": 4 * 2**30},
  }
  text = compile_for_pod.text(
    {
      "topology": "v5e:2x2",
      "devices": 4,
      "mesh": {"data": 4},
      "hbm_gib": 16,
      "programs": {"with memory": program},
    }
  )
  assert "with memory: DOES NOT FIT in 16 GiB; largest array tables/1" in text
  assert "5.00 GiB of 10.00 GiB of state" in text
  assert "the compiler: Ran out of memory on HBM" in text


def has_libtpu():
  try:
    return bool(importlib.metadata.version("libtpu"))
  except importlib.metadata.PackageNotFoundError:
    return False


@pytest.mark.skipif(not has_libtpu(), reason="needs libtpu")
def test_compiles_for_a_tpu():
  # In a process of its own: libtpu, once loaded, stays.
  code = """
import jax
from engram_jax.run_config import MeshConfig
from experiments import compile_for_pod as pod
from tests.experiments.micro import experiment
import dataclasses
config = experiment()
train = dataclasses.replace(config.train, batch_size=8)
config = dataclasses.replace(
  config, train=train, mesh=MeshConfig(expert=2))
result = pod.measure(config, "v5e:2x2", without_memory=False)
(program,) = result["programs"].values()
assert program["fits"] and program["cost"]["optimal_seconds"] > 0
assert program["collectives"]["of_tables"] == []
assert result["devices"] == 4 and "fits" in pod.text(result)
"""
  subprocess.run(
    [sys.executable, "-c", code],
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    check=True,
  )
