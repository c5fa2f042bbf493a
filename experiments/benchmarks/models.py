"""Models on random tokens, and their training: what several benchmarks run.

Hashes are of raw token ids, without a tokenizer. Random tokens at the start of
training do not change what a step costs, and read rows that no cache holds.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding

from engram_jax import sharding
from engram_jax.backbone.transformer import Transformer
from engram_jax.config import ModelConfig
from engram_jax.decoding.weights import DecodingModel, for_decoding
from engram_jax.errors import require
from engram_jax.memory.memory import Memory
from engram_jax.memory.row_sparse import RowOptimizer
from engram_jax.presets import Preset, preset
from engram_jax.run_config import DEFAULT_MESH, MeshConfig, TrainConfig
from engram_jax.training.setup import TrainSetup
from experiments.benchmarks import harness

Batch = dict[str, jax.Array]
#: Arrays [B, L] of a batch.
DTYPES = {
  "inputs": jnp.int32,
  "targets": jnp.int32,
  "breaks": jnp.int8,
  "loss_mask": jnp.bool_,
}


def preset_with_memory(name: str) -> Preset:
  """A preset of `engram_jax/presets.py`.

  Raises:
    InputError: there is none of this name, or its model has no memory.
  """
  found = preset(name)
  require(found.model.engram, "preset", name, "a model with a memory")
  return found


def make_setup(
  model: ModelConfig,
  train: TrainConfig,
  *,
  mesh: Mesh | None = None,
  mesh_config: MeshConfig = DEFAULT_MESH,
  row_optimizer: RowOptimizer | None = None,
) -> TrainSetup:
  """The training of a model on raw token ids; arguments as `TrainSetup`'s."""
  memory = None
  if model.engram is not None:
    memory = Memory.create(model.engram, vocab_size=model.vocab_size)
  options = dict(mesh=mesh, mesh_config=mesh_config)
  return TrainSetup.create(
    model, train, memory, row_optimizer=row_optimizer, **options
  )


def abstract_batch(
  batch: int, length: int, *, placed: Sharding | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes, dtypes and places of a batch [batch, length]."""
  return {
    name: jax.ShapeDtypeStruct((batch, length), dtype, sharding=placed)
    for name, dtype in DTYPES.items()
  }


def make_batches(setup: TrainSetup, count: int) -> list[Batch]:
  """So many batches of random tokens, on the setup's devices."""
  train, rng = setup.train, harness.rng()
  shape = train.batch_size, train.seq_len + 1
  batches = []
  for _ in range(count):
    tokens = rng.integers(0, setup.model.vocab_size, shape)
    arrays = {
      "inputs": tokens[:, :-1],
      "targets": tokens[:, 1:],
      "breaks": np.zeros_like(tokens[:, 1:]),
      "loss_mask": np.ones_like(tokens[:, 1:]),
    }
    batch = {k: jnp.asarray(x, DTYPES[k]) for k, x in arrays.items()}
    batches.append(sharding.place_batch(batch, setup.mesh))
  return batches


def steps(
  step: Callable[[Any, Batch], tuple[Any, Any]],
  state: Any,
  batches: list[Batch],
) -> Callable[[], Any]:
  """A function whose every call is one step, on the next of the batches.

  Args:
    step: donates the state that it is given.
    state: the first.
    batches: which come again and again.

  Returns:
    A function that returns a step's metrics when all of it is computed.
  """
  stream = itertools.cycle(batches)

  def call():
    nonlocal state
    state, metrics = jax.block_until_ready(step(state, next(stream)))
    return metrics

  return call


def random_model(config: ModelConfig) -> DecodingModel:
  """A model as decoding takes it, with weights drawn by NumPy.

  To compile the drawing of every array takes longer.
  """
  graph, shapes = jax.eval_shape(
    lambda: nnx.split(Transformer(config, rngs=nnx.Rngs(params=0)))
  )
  rng = harness.rng()

  def draw(path, leaf):
    if "scale" in str(path):
      return jnp.ones(leaf.shape, leaf.dtype)
    values = rng.standard_normal(leaf.shape, np.float32)
    return jnp.asarray(config.init_std * values, leaf.dtype)

  return for_decoding(nnx.merge(graph, jax.tree.map_with_path(draw, shapes)))
