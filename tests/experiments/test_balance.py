"""The benchmark of the balancing bias, on a run of some steps."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.backbone.moe import BalancingBias
from engram_jax.errors import InputError
from engram_jax.training.runs import load_run
from experiments.benchmarks import balance
from experiments.sweeps import changed
from tests.experiments.micro import experiment


def test_windows():
  found = balance.windows([1, 2, 3, 4, 6], 2)
  assert found == [[2, 1.5], [4, 3.5], [5, 6.0]]
  with pytest.raises(InputError, match=r"^window: 0; valid: an integer >= 1"):
    balance.windows([1.0], 0)


def test_figures_come_from_the_metrics():
  config = changed(experiment(), {"model.num_layers": 3})
  assignments = 4 * 16 * 2 * 2  # batch, length, top_k, blocks
  records = [
    {"max_violation/0": step, "max_violation/1": 3 * step, "dropped": 64.0}
    for step in (1.0, 2.0, 3.0)
  ]
  found = balance.from_metrics(records, config, 2)
  assert found == {
    "max_violation": [[2, 3.0], [3, 6.0]],
    "dropped": [[2, 64 / assignments], [3, 64 / assignments]],
    "worst_block": 9.0,
  }


def test_effect_of_a_bias():
  bias = np.array([[0.1, -0.1, 0.0, 0.0], [0.0, 0.0, 0.2, -0.2]])
  without = np.array([[1.0, 9.0, 5.0, 5.0], [5.0, 5.0, 1.0, 9.0]])
  even = np.full((2, 4), 5.0)
  found = balance.effect(bias, even, without)
  assert found["right_way"] == 1
  assert found["correlation"] > 0.9
  assert found["max_violation"] == 0
  assert found["max_violation_without"] == pytest.approx(0.8)
  # The other way round: busy experts were given yet more.
  found = balance.effect(-bias, even, without)
  assert found["right_way"] == 0 and found["correlation"] < -0.9


def test_no_bias_has_no_effect():
  load = np.array([[1.0, 3.0]])
  found = balance.effect(np.zeros((1, 2)), load, load)
  assert found == {
    "max_violation": 0.5,
    "max_violation_without": 0.5,
    "right_way": None,
    "correlation": None,
  }


@pytest.fixture(scope="module")
def result(program, tmp_path_factory):
  """Folder of the runs, what was printed, and the result."""
  folder = tmp_path_factory.mktemp("balance")
  out = folder / "balance.json"
  done = program(
    "benchmarks.balance",
    *(f"--workdir={folder}/runs", "--seeds=0", "--cases=bias alone,neither"),
    *("--window=4", f"--out={out}", "--config.model.moe.balance_rate=0.05"),
  )
  assert done.returncode == 0, done.stderr
  return folder, done.stdout, json.loads(out.read_text())


def test_program_reports_each_case(result):
  folder, printed, found = result
  assert "right way" in printed and "bias alone, seed 0: MaxVio" in printed
  assert found["balance_rate"] == 0.05 and found["balance_loss"] == 1e-4
  assert set(found["cases"]) == {"bias alone", "neither"}
  for records in found["cases"].values():
    (record,) = records
    steps = [step for step, _ in record["max_violation"]]
    assert steps == [4, 8, 12]
    assert record["loss"] > 0
  png = (folder / "balance.png").read_bytes()
  assert png.startswith(b"\x89PNG")


def test_only_the_named_fields_are_off(result):
  folder, _, _ = result
  for case, rate in (("bias-alone", 0.05), ("neither", 0.0)):
    config = load_run(folder / "runs" / f"{case}-seed0").config
    moe = config.model.moe
    assert (moe.balance_rate, moe.balance_loss) == (rate, 0.0)


def test_loads_are_of_the_bias_and_of_none(result):
  folder, _, found = result
  (record,) = found["cases"]["neither"]
  assert record["bias"]["right_way"] is None
  trained = load_run(folder / "runs" / "bias-alone-seed0")
  graph, params, learned = nnx.split(trained.model, nnx.Param, BalancingBias)
  # Affinities are between 0 and 1: the first is always chosen, the last never.
  chosen = jnp.array([[1.0, 0.0, 0.0, -1.0]])
  bias = jax.tree.map(lambda _: chosen, learned)
  trained = dataclasses.replace(trained, model=nnx.merge(graph, params, bias))
  batch = {
    "inputs": np.arange(32).reshape(2, 16) % 280,
    "breaks": np.zeros((2, 16), np.int8),
  }
  bias, load, without = balance.loads(trained, [batch, batch])
  assert bias.tolist() == chosen.tolist()
  assert (load[0, 0], load[0, 3]) == (64, 0)
  assert load.sum() == without.sum() == 2 * 32 * 2
  assert without[0, 0] < 64 and without[0, 3] > 0
  assert (load % 2 == 0).all() and (without % 2 == 0).all()
