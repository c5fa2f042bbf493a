"""A model of three blocks with two Engram layers, for what looks inside.

The library is imported inside the fixture: pytest may load this file before the
hook that checks the annotations is in place.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest

VOCAB, BATCH, LENGTH, WIDTH = 40, 2, 9, 8


@dataclasses.dataclass(frozen=True)
class Probed:
  """Model, memory and tables with random numbers, and a batch."""

  model: Any
  memory: Any
  tables: Any
  batch: Any


def _make(**changes):
  import jax
  import jax.numpy as jnp
  from flax import nnx

  from engram_jax.config import (
    AttentionConfig,
    EngramConfig,
    ModelConfig,
    MoEConfig,
  )
  from engram_jax.memory.memory import Memory
  from engram_jax.training.state import abstract_model

  streams = changes.get("streams", 1)
  fields = dict(
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    num_layers=3,
    attention=AttentionConfig(
      num_heads=2, nope_dim=4, rope_dim=4, value_dim=4, kv_rank=4
    ),
    dense_size=8,
    # A capacity that drops most assignments: what is looked at must not.
    moe=MoEConfig(num_experts=4, top_k=2, expert_size=4, capacity_factor=0.1),
    engram=EngramConfig(
      hidden_size=WIDTH,
      layers=(0, 2),
      rows_per_head=(30, 30),
      heads=2,
      head_dim=4,
      pad_id=0,
      streams=streams,
    ),
  )
  config = ModelConfig(**fields | changes)
  rng = np.random.default_rng(0)

  def random(shape):
    return jnp.asarray(rng.normal(scale=0.5, size=shape), jnp.float32)

  graph, *state = abstract_model(config)
  model = nnx.merge(graph, *jax.tree.map(lambda x: random(x.shape), state))
  memory, tables = None, {}
  if config.engram is not None:
    memory = Memory.create(config.engram, vocab_size=VOCAB)
    tables = {i: random((rows, 4)) for i, rows in memory.num_rows.items()}
  shape = (BATCH, LENGTH)
  batch = {
    "inputs": jnp.asarray(rng.integers(1, VOCAB, shape), jnp.int32),
    "targets": jnp.asarray(rng.integers(1, VOCAB, shape), jnp.int32),
    "breaks": jnp.zeros(shape, jnp.int8).at[1, 4].set(1),
    "loss_mask": jnp.ones(shape, bool).at[1, 3].set(False),
  }
  return Probed(model, memory, tables, batch)


@pytest.fixture(scope="session")
def make_probed():
  """A function that makes one; arguments change the model's config."""
  return _make


@pytest.fixture(scope="session")
def probed():
  return _make()
