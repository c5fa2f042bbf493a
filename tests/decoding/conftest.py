"""One tiny model in several kinds, and its plain forward pass.

Nothing of engram_jax is imported at the top: see `tests/conftest.py`.
"""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

# Raw ids 24 to 27 are the model's alone; 0 is the pad token.
VOCAB, MODEL_VOCAB, PAD = 24, 28, 0


@dataclasses.dataclass(frozen=True)
class Tiny:
  """A model with everything that decoding takes."""

  model: Any
  tables: Any
  memory: Any

  @property
  def hashing(self):
    return self.memory.hashing

  @property
  def compression(self):
    return self.memory.compression

  @property
  def store(self):
    """The tables as a store."""
    from engram_jax.stores.program_stores import TableStore

    return self.tables and TableStore(self.tables)

  @property
  def parts(self):
    """The arguments that most functions begin with."""
    return self.model, self.memory, self.store

  def logits(self, token_ids, *, memory=True):
    """The full forward pass [B, L, V], no cache, experts without drops."""
    memory = self.memory if memory else None
    return np.asarray(_forward(self.model, self.tables, memory, token_ids))


@functools.partial(jax.jit, static_argnums=2)
def _forward(model, tables, memory, token_ids):
  rows = None
  if memory is not None:
    row_ids = memory.row_ids(token_ids)
    rows = {i: tables[i][ids] for i, ids in row_ids.items()}
  return model(token_ids, rows, dispatch="dense").logits


@functools.cache
def make_tiny(kind, **engram_fields):
  """`conv`, `bare` (a memory without convolution) or `plain` (no memory).

  `wide` is `conv` with rows that every format takes, and a block before them.
  The fields, of the memory's config, are changed besides.
  """
  from engram_jax import config as configs
  from engram_jax.backbone.transformer import Transformer
  from engram_jax.memory.compression import TokenCompression
  from engram_jax.memory.memory import Memory

  width, engram, memory, tables = 32, None, None, None
  if kind != "plain":
    fields = dict(
      hidden_size=width,
      layers=(1, 2) if kind == "wide" else (0, 2),
      rows_per_head=(60, 70),
      heads=2,
      head_dim=32 if kind == "wide" else 4,
      pad_id=PAD,
      short_conv=kind != "bare",
      conv_kernel_size=3,
      conv_dilation=2,
    )
    engram = configs.EngramConfig(**fields | engram_fields)
    # Neighbouring ids read alike.
    compression = TokenCompression.from_canonical_ids(np.arange(VOCAB) // 2)
    memory = Memory.from_compression(engram, compression)
    rng = np.random.default_rng(1)
    tables = {
      layer: jnp.asarray(rng.normal(size=(rows, engram.head_dim)), jnp.float32)
      for layer, rows in memory.num_rows.items()
    }
  config = configs.ModelConfig(
    vocab_size=MODEL_VOCAB,
    hidden_size=width,
    num_layers=3,
    attention=configs.AttentionConfig(
      num_heads=2, nope_dim=8, rope_dim=4, value_dim=8, kv_rank=8
    ),
    dense_size=16,
    # Buckets so small that a decoder which used them would be found out.
    moe=configs.MoEConfig(
      num_experts=4, top_k=2, expert_size=8, num_shared=1, capacity_factor=0.5
    ),
    engram=engram,
  )

  # Filled by NumPy: to compile the drawing of each array takes longer than all
  # else. Loud weights, and a convolution that does not start at zero.
  graph, shapes = jax.eval_shape(
    lambda: nnx.split(Transformer(config, rngs=nnx.Rngs(params=0)))
  )
  rng = np.random.default_rng(0)
  params = jax.tree.map_with_path(
    lambda path, leaf: jnp.asarray(
      0.3 * rng.normal(size=leaf.shape) + ("scale" in str(path)), jnp.float32
    ),
    shapes,
  )
  model = nnx.merge(graph, params)
  return Tiny(model, tables, memory)


@pytest.fixture
def compiled(caplog):
  """A context that counts how often a function is compiled in it, by name."""

  @contextlib.contextmanager
  def listen():
    caplog.clear()
    with jax.log_compiles():
      yield count

  def count(*names):
    lines = (record.getMessage() for record in caplog.records)
    lines = [line for line in lines if line.startswith("Compiling ")]
    return sum(any(name in line for name in names) for line in lines)

  return listen


@pytest.fixture(scope="session", params=["conv", "bare", "plain"])
def every_tiny(request):
  """The tiny model in all its kinds."""
  return make_tiny(request.param)


@pytest.fixture(scope="session")
def tiny():
  """The tiny model with memory and convolution."""
  return make_tiny("conv")


@pytest.fixture(scope="session")
def make_tiny_with():
  """Makes the tiny model of a kind, with fields of its memory's changed."""
  return make_tiny


@pytest.fixture(scope="session")
def tiny_wide():
  """The tiny model that the row formats fit."""
  return make_tiny("wide")


@pytest.fixture(scope="session")
def tiny_plain():
  """The tiny model without a memory."""
  return make_tiny("plain")
