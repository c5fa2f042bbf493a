"""Experts against a dense model, at a tiny size; no time is judged."""

import json

import pytest

from engram_jax.errors import InputError
from engram_jax.presets import Preset, preset
from experiments.benchmarks import moe_against_dense
from tests.experiments.micro import experiment

pytestmark = pytest.mark.usefixtures("steps_compile_fast")


def micro(name=""):
  """The smallest model, as a preset."""
  config = experiment()
  return Preset(config.model, config.train, config.mesh, "", ())


def test_dense_model_activates_as_much():
  every = moe_against_dense.models(preset("small").model)
  found = {
    name: moe_against_dense.counts(model)["activated_without_embedding"]
    for name, model in every.items()
  }
  dense = every["dense"]
  assert dense.moe is None and dense.engram is None
  width = 3 * dense.hidden_size * dense.num_layers  # of one more in all blocks
  assert abs(found["dense"] - found["moe"]) <= width / 2
  assert found["moe, memory"] > found["moe"]


def test_models_want_experts_and_memory():
  with pytest.raises(InputError, match=r"^preset: a dense model; valid: one"):
    moe_against_dense.models(preset("dense_4b").model)
  with pytest.raises(InputError, match=r"^preset: no memory; valid: a preset"):
    moe_against_dense.models(preset("moe_27b").model)


def test_experts_against_dense(monkeypatch):
  monkeypatch.setattr(moe_against_dense, "find_preset", micro)
  answer = moe_against_dense.measure(preset="", batch=2, length=16, repeats=1)
  assert json.loads(json.dumps(answer)) == answer
  dense, moe, memory = answer["records"]
  assert memory["activated"] > moe["activated"]
  for record in (dense, moe):
    assert record["tokens_per_s"] == 32 / (record["median_ms"] / 1e3)
    assert record["loss"] == pytest.approx(5.7, abs=0.2)
  assert dense["ratio"] == 1
  assert dense["dropped"] is None and 0 <= moe["dropped"] < 1
  assert dense["total"] == dense["activated"] < moe["total"]
  # A step multiplies by each activated weight three times, and more.
  assert dense["gflops"] > 6 * 32 * dense["activated"] / 1e9
  text = "".join(moe_against_dense.tables(answer))
  assert "tokens_per_s" in text and "moe" in text
