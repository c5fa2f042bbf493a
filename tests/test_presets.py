"""Tests of the presets: the published numbers, and that all can be built."""

import dataclasses
import json

import jax
import pytest

from engram_jax.config_dicts import from_dict, to_dict
from engram_jax.errors import InputError
from engram_jax.presets import PRESETS, preset
from engram_jax.run_config import ExperimentConfig
from engram_jax.training.state import abstract_model, flatten
from experiments.configs import preset as preset_config
from experiments.configs import tiny as tiny_config

FAMILY = ("dense_4b", "moe_27b", "engram_27b", "engram_40b")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_model_that_can_be_built(name):
  found = preset(name)
  assert found == PRESETS[name]()
  assert found.source
  assert all(item.endswith(".") for item in found.assumptions)
  _, params, _ = abstract_model(found.model)  # allocates nothing
  shapes = {path: leaf.shape for path, leaf in flatten(params).items()}
  model = found.model
  assert shapes["embedding/table"] == (model.vocab_size, model.hidden_size)
  assert all(leaf.dtype == "float32" for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_config_file(name):
  found = preset(name)
  config = preset_config.get_config(name)
  stored = json.loads(json.dumps(config.to_dict()))
  whole = from_dict(ExperimentConfig, stored)
  assert (whole.model, whole.train, whole.mesh) == (
    found.model,
    found.train,
    found.mesh,
  )
  assert whole.data.vocab_size == found.model.vocab_size
  assert from_dict(ExperimentConfig, to_dict(whole)) == whole


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_has_the_published_numbers(name):
  found = preset(name)
  model, train = found.model, found.train
  sizes = (model.num_layers, model.hidden_size, model.vocab_size, model.streams)
  assert sizes == (30, 2560, 129_280, 4)
  assert model.attention.num_heads == 32
  assert model.sinkhorn_iterations == 20
  assert (train.batch_size, train.seq_len, train.steps) == (1280, 4096, 50_000)
  tokens = train.batch_size * train.seq_len * train.steps
  assert tokens == pytest.approx(262e9, rel=1e-3)
  assert (train.optimizer, train.learning_rate) == ("muon", 4e-4)
  assert train.weight_decay == 0.1
  assert train.decay_points == (0.8, 0.9)
  assert train.decay_factors == (0.316, 0.1)
  assert train.warmup_steps == 2000
  assert (train.table_optimizer, train.table_learning_rate_multiplier) == (
    "lazy_adam",
    5.0,
  )
  experts = {"dense_4b": None, "moe_27b": 72}.get(name, 55)
  if experts is None:
    assert model.moe is None
  else:
    moe = model.moe
    assert (moe.num_experts, moe.num_shared, moe.top_k) == (experts, 2, 6)
    assert model.num_dense_layers == 1


@pytest.mark.parametrize(
  "name, rows", [("engram_27b", 2_262_400), ("engram_40b", 7_239_680)]
)
def test_the_familys_memory_has_the_published_numbers(name, rows):
  memory = preset(name).model.engram
  assert memory.rows_per_head == (rows, rows)
  assert memory.layers == (1, 14)  # the paper counts from 1: 2 and 15
  assert (memory.heads, memory.head_dim, memory.memory_width) == (8, 80, 1280)
  assert (memory.short_conv, memory.conv_kernel_size) == (True, 4)
  assert memory.dilation == 3


def test_the_family_differs_in_experts_and_memory_alone():
  dense = preset("dense_4b")
  for name in FAMILY[1:]:
    other = preset(name)
    plain = dataclasses.replace(other.model, engram=None, moe=None)
    assert plain == dense.model
    assert other.train == dense.train
    assert other.mesh == dense.mesh


def test_the_ablation_reads_100_billion_tokens():
  found = preset("ablation_3b")
  train, memory = found.train, found.model.engram
  tokens = train.steps * train.batch_size * train.seq_len
  assert tokens == pytest.approx(100e9, rel=1e-5)
  assert memory.layers == (1, 5)
  assert found.model.num_layers == 12
  entries = len(memory.layers) * memory.memory_width * memory.rows_per_head[0]
  assert round(entries / 1e9, 2) == 1.65


def test_the_tiny_config_is_the_preset():
  config, found = tiny_config.experiment(), preset("tiny")
  assert (config.model, config.train) == (found.model, found.train)
  assert config == preset_config.experiment_of("tiny")
  assert config.data.vocab_size == 4096
  # README.md's figures are of these numbers.
  model, train = found.model, found.train
  sizes = (model.num_layers, model.hidden_size, model.dense_size)
  assert sizes == (4, 128, 384)
  assert (train.steps, train.batch_size, train.seq_len) == (400, 8, 256)
  assert (train.learning_rate, train.warmup_steps) == (2e-3, 30)


@pytest.mark.parametrize(
  "name, valid",
  [
    ("engram_28b", "did you mean engram_27b"),
    ("Engram-27B", "did you mean engram_27b"),
    ("llama", "one of dense_4b, moe_27b"),
    ("", "one of dense_4b, moe_27b"),
  ],
)
def test_an_unknown_preset_is_refused_with_those_near(name, valid):
  with pytest.raises(InputError, match=f"preset: .*; valid: {valid}"):
    preset(name)
  with pytest.raises(InputError, match=valid):
    preset_config.get_config(name)
