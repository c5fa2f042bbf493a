"""The training step compiled ahead of time, for devices that are not here."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import pytest

from engram_jax.errors import InputError
from experiments import compile_for_pod, pod_report
from experiments.configs.preset import experiment_of
from tests.libtpu import needs_libtpu

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
  memory, plain = result["programs"].values()
  assert list(memory["mesh"].items()) == [
    ("replica", 1),
    ("data", 4),
    ("expert", 2),
    ("tensor", 1),
  ]
  assert (memory["sequences"], memory["tokens"]) == (1, 16)
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
  assert memory["instructions"] > plain["instructions"] > 0
  steps = ("trace_seconds", "lower_seconds", "compile_seconds")
  assert all(memory[name] > 0 for name in steps)


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
    "cpu:8: 8 devices",
    "mesh replica 1, data 4, expert 2, tensor 1",
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
  name = "mesh.replica * mesh.data * mesh.expert * mesh.tensor"
  assert line.startswith(f"error: {name}: 3; valid: the number of devices, 8")


@pytest.mark.parametrize(
  "topology, valid",
  [
    ("v9z:2x2", "cpu:N, or one of v4:SHAPE"),
    ("v5p", "cpu:N, or one of v4:SHAPE"),
    ("cpu:one", "cpu:N with N of 2 to 9999"),
    ("cpu:1", "cpu:N with N of 2 to 9999"),
  ],
)
def test_refuses_topologies_that_there_are_not(topology, valid):
  with pytest.raises(
    InputError, match=f"^topology: {topology}; valid: {valid}"
  ):
    compile_for_pod.devices_of(topology)


def test_refuses_a_single_device():
  with pytest.raises(InputError, match=r"^topology: one device; valid: two"):
    compile_for_pod.make_mesh(experiment_of("tiny"), jax.devices()[:1])


def test_takes_a_config_or_a_preset(program):
  arguments = ("compile_for_pod", "--topology=cpu:8")
  for configured, more in ((False, ()), (True, ("--preset=engram_27b",))):
    done = program(*arguments, *more, configured=configured)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.endswith("valid: either --preset=NAME or --config=FILE.py")


def test_a_preset_with_another_batch():
  config = experiment_of("engram_27b")
  assert config.data.vocab_size == config.model.vocab_size
  accumulated = dataclasses.replace(config.train, batch_size=64, accumulation=4)
  config = dataclasses.replace(config, train=accumulated)
  with_batch = compile_for_pod.with_batch

  def batch(**changes):
    train = with_batch(config, 16, **changes).train
    return train.batch_size, train.accumulation

  assert batch() == (64, 4)
  assert batch(per_chip=3) == (48, 1)
  assert batch(per_chip=3, accumulation=3) == (48, 3)
  assert batch(accumulation=2) == (64, 2)
  with pytest.raises(InputError, match=r"^accumulation: 7; valid: a divisor"):
    batch(accumulation=7)


def test_compares_two_presets_at_the_same_batch():
  config = experiment_of("engram_27b")
  config = compile_for_pod.with_batch(config, 8, per_chip=2)
  both = compile_for_pod.compared_with(config, "engram_27b", "moe_27b")
  assert list(both) == ["engram_27b", "moe_27b"]
  first, second = (each.train for each in both.values())
  assert first.batch_size == second.batch_size == 16
  assert first.seq_len == second.seq_len
  assert both["moe_27b"].model.engram is None
  with pytest.raises(
    InputError, match=r"^compare_with: engram_27b; valid: ano"
  ):
    compile_for_pod.compared_with(config, "engram_27b", "engram_27b")


def test_without_memory_needs_one():
  config = experiment_of("moe_27b")
  with pytest.raises(InputError, match=r"^model.engram: None; valid: a memory"):
    compile_for_pod.with_and_without(config)


def result_of(program, **more):
  """A result of one program, for the report."""
  return {
    "topology": "v5e:2x2",
    "devices": 4,
    "hbm_gib": 16,
    "programs": {"with memory": program},
    **more,
  }


PROGRAM = {
  "mesh": {"data": 4},
  "sequences": 2,
  "parameters": {"total": 5, "tables": 3, "activated": 1},
  "state_bytes": {"params": 2**30, "tables": 9 * 2**30},
  "largest_arrays": {"tables/1": 5 * 2**30, "tables/2": 4 * 2**30},
}


def test_says_what_does_not_fit():
  program = PROGRAM | {
    "fits": False,
    "refusal": "Ran out of memory on HBM",
    "largest_temporaries": [
      {"bytes": 3 * 2**30, "shapes": "f32[8,4], 2×s32[4]"},
      {"bytes": 2**20, "shapes": "bf16[2]"},
    ],
  }
  text = "\n\n".join(pod_report.tables(result_of(program)))
  assert (
    "with memory: DOES NOT FIT in 16 GiB; largest array tables/1, 5.00 GiB of "
    "10.00 GiB of state; largest temporaries 3.00 GiB f32[8,4], 2×s32[4], "
    "1.0 MiB bf16[2]\n"
  ) in text
  assert "the compiler: Ran out of memory on HBM" in text


def test_says_what_the_figures_leave_out():
  record = {"kind": "all-reduce", "dtype": "f32", "shape": [8], "bytes": 32}
  program = PROGRAM | {
    "fits": True,
    "memory": {"peak": 2**30},
    "cost": {
      "flops": 2e12,
      "optimal_seconds": 0.25,
      "compiler_seconds": 0.5,
      "unknown_loops": 1,
      "conditionals": 2,
    },
    "collectives": {
      "largest": [record | {"times": 29, "arrays": 1}],
      "in_loops": 3,
      "executions": 87,
      "of_tables": [],
    },
    "copies_of_tables": [],
    "unknown_turns": 5,
    "top_operations": [
      {
        "name": "fusion.1",
        "op_name": "jit(step)/while/body/dot_general",
        "opcode": "fusion",
        "times": 29,
        "seconds": 0.01,
        "compiler_seconds": seconds,
      }
      for seconds in (0.02, None)
    ],
  }
  result = result_of(program, optimal_seconds_ratio=1.0625)
  text = "\n\n".join(pod_report.tables(result))
  for words in (
    "all-reduce of 0.0 MiB, f32[8], 29 times",
    "3 collectives are in loops; all together run 87 times",
    "1 loops end where the data say: they count 5 times",
    "2 conditionals counted by their larger branch: an upper bound",
    "10.00 ms at peak, 20.00 ms in cycles, 29 times fusion jit(step)/while/",
    "10.00 ms at peak, no cycles, 29 times",
    "estimate at peak rates, with memory: 1.062",
  ):
    assert words in text, words


@needs_libtpu
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
devices = pod.devices_of("v5e:2x2")
result = pod.compile_runs({"micro": config}, "v5e:2x2", devices)
(program,) = result["programs"].values()
assert program["fits"] and program["cost"]["optimal_seconds"] > 0
assert program["cost"]["compiler_seconds"] > 0
assert program["cost"]["unknown_loops"] == 0
assert program["collectives"]["of_tables"] == []
assert len(program["top_operations"]) == pod.TOP
assert result["devices"] == 4
assert "fits" in "".join(pod.pod_report.tables(result))

# Scores of 2 heads of 65,536^2 in float32: 32 GiB of 16.
train = dataclasses.replace(train, seq_len=65_536)
refused = pod.compile_step(
  dataclasses.replace(config, train=train),
  pod.make_mesh(config, devices),
  generation="v5e",
)
assert not refused["fits"] and refused["largest_temporaries"], refused
"""
  subprocess.run(
    [sys.executable, "-c", code],
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    check=True,
  )
