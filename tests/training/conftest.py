"""A model of one block with everything in it, and its training setup.

The library is imported inside the fixtures: pytest may load this file before
the hook that checks the annotations is in place.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest

VOCAB, BATCH, LENGTH = 60, 4, 12


@dataclasses.dataclass(frozen=True, eq=False)
class Tiny:
  """One training setup."""

  setup: Any

  def abstract_state(self):
    """The state's shapes; allocates nothing."""
    return self.setup.abstract_state()

  def state(self, seed: int = 0):
    """A new state, drawn by NumPy: the setup's own takes seconds to compile."""
    import jax
    import jax.numpy as jnp

    from engram_jax.training.state import flatten, unflatten

    rng = np.random.default_rng(seed)
    template = self.abstract_state()
    leaves = {}
    for name, leaf in flatten(template).items():
      if name.startswith("params/") and not name.endswith("scale"):
        value = 0.3 * rng.normal(size=leaf.shape)
      elif name.startswith("params/"):
        value = np.ones(leaf.shape)
      elif name.startswith("tables/"):
        value = 0.5 * rng.normal(size=leaf.shape)
      else:
        value = np.zeros(leaf.shape)
      # By jnp.array, so that XLA owns the buffer and may write in place.
      leaves[name] = jnp.array(value, leaf.dtype)
    return jax.block_until_ready(unflatten(template, leaves))


def _make_tiny(*, memory: bool = True, model=None, **train) -> Tiny:
  """A setup; `model` changes the model's config, `train` the training's."""
  from engram_jax.config import (
    AttentionConfig,
    EngramConfig,
    ModelConfig,
    MoEConfig,
  )
  from engram_jax.memory.compression import TokenCompression
  from engram_jax.memory.memory import Memory
  from engram_jax.run_config import TrainConfig
  from engram_jax.training.setup import TrainSetup

  hidden_size = 8
  fields: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": hidden_size,
    "num_layers": 1,
    "num_dense_layers": 0,
    "attention": AttentionConfig(
      num_heads=2, nope_dim=4, rope_dim=2, value_dim=6, kv_rank=4
    ),
    "dense_size": 16,
    "moe": MoEConfig(
      num_experts=4,
      top_k=2,
      expert_size=8,
      num_shared=1,
      dispatch="dense",
      balance_rate=0.01,
    ),
    "engram": EngramConfig(
      hidden_size=hidden_size,
      layers=(0,),
      rows_per_head=(150, 150),
      heads=1,
      head_dim=4,
      projection_bias=True,
    ),
  }
  fields |= model or {}
  if not memory:
    fields["engram"] = None
  config = ModelConfig(**fields)
  options = {
    "steps": 20,
    "batch_size": BATCH,
    "seq_len": LENGTH,
    "warmup_steps": 2,
    "learning_rate": 0.01,
  }
  training = TrainConfig(**options | train)
  shared = None
  if config.engram is not None:
    # Two tokens to one canonical id, so that the map matters.
    compression = TokenCompression.from_canonical_ids(np.arange(VOCAB) // 2)
    shared = Memory.from_compression(config.engram, compression)
  return Tiny(TrainSetup.create(config, training, shared))


def _make_batch(seed: int = 0, length: int = LENGTH):
  """Random tokens in documents, with a loss on most of them."""
  import jax.numpy as jnp

  rng = np.random.default_rng(seed)
  shape = (BATCH, length)
  return {
    "inputs": jnp.asarray(rng.integers(0, VOCAB, shape), jnp.int32),
    "targets": jnp.asarray(rng.integers(0, VOCAB, shape), jnp.int32),
    "breaks": jnp.asarray(rng.random(shape) < 0.1, jnp.int8),
    "loss_mask": jnp.asarray(rng.random(shape) < 0.9),
  }


@pytest.fixture(scope="session")
def make_tiny():
  return _make_tiny


@pytest.fixture(scope="session")
def make_batch():
  return _make_batch


@pytest.fixture(scope="session")
def tiny():
  """The setup that most tests share."""
  return _make_tiny()


@pytest.fixture(scope="session")
def train_step(tiny):
  """Its step, compiled once."""
  from engram_jax.training.step import make_train_step

  return make_train_step(tiny.setup)
