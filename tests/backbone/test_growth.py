"""A transformer over a grown memory: the same logits, and more to learn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.backbone.growth import grow_transformer
from engram_jax.backbone.transformer import Transformer
from engram_jax.config import AttentionConfig, EngramConfig, ModelConfig
from engram_jax.errors import InputError
from engram_jax.memory.growth import add_orders, multiply_rows
from engram_jax.memory.memory import Memory

VOCAB, WIDTH = 30, 8
CONFIG = ModelConfig(
  vocab_size=VOCAB,
  hidden_size=WIDTH,
  num_layers=2,
  attention=AttentionConfig(
    num_heads=2, nope_dim=4, rope_dim=2, value_dim=4, kv_rank=4
  ),
  dense_size=16,
  engram=EngramConfig(
    hidden_size=WIDTH,
    layers=(1, 0),
    rows_per_head=(40, 50),
    heads=2,
    head_dim=4,
    table_init_std=0.5,
  ),
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (2, 12)))


@pytest.fixture(scope="module")
def model():
  made = Transformer(CONFIG, rngs=nnx.Rngs(0))
  for engram in made.engrams:  # its convolution starts at zero, unheard
    shape = engram.conv_kernel.shape
    engram.conv_kernel[...] = 0.3 * jax.random.normal(jax.random.key(1), shape)
  return made


@pytest.fixture(scope="module")
def memory():
  return Memory.create(CONFIG.engram, vocab_size=VOCAB)


@jax.jit
def forward(model, rows):
  return model(TOKENS, rows).logits


@jax.jit
def gradient(model, rows):
  return jax.grad(lambda rows: jnp.sum(model(TOKENS, rows).logits ** 2))(rows)


def rows_of(memory, tables):
  ids = memory.row_ids_numpy(TOKENS)
  return {layer: jnp.asarray(tables[layer])[x] for layer, x in ids.items()}


def logits_of(model, memory, tables):
  return forward(model, rows_of(memory, tables))


def test_more_rows_leave_every_bit_of_the_logits(model, memory):
  tables = memory.init_tables(jax.random.key(0))
  larger, grown = multiply_rows(memory, tables, factor=3)
  key = jax.random.key(2)
  same = grow_transformer(model, larger.config, key=key)
  before = np.asarray(logits_of(model, memory, tables))
  after = np.asarray(logits_of(same, larger, grown))
  assert before.tobytes() == after.tobytes()


def test_a_new_order_leaves_the_logits_but_for_rounding(model, memory):
  tables = memory.init_tables(jax.random.key(0))
  larger, grown = add_orders(memory, tables, rows_per_head=(60,))
  wider = grow_transformer(model, larger.config, key=jax.random.key(2))
  before = logits_of(model, memory, tables)
  np.testing.assert_allclose(
    logits_of(wider, larger, grown), before, rtol=0, atol=1e-6
  )

  # New rows have a gradient, and are heard once they are no longer zeros.
  for of_rows in gradient(wider, rows_of(larger, grown)).values():
    assert jnp.abs(of_rows[..., 4:, :]).max() > 1e-3
  trained = {i: t.at[memory.num_rows[i] :].set(1) for i, t in grown.items()}
  assert jnp.abs(logits_of(wider, larger, trained) - before).max() > 1e-3


def test_it_is_a_model_of_the_grown_config(model, memory):
  tables = memory.init_tables(jax.random.key(0))
  config = add_orders(memory, tables, rows_per_head=(60,)).memory.config
  wider = grow_transformer(model, config, key=jax.random.key(2))
  whole = dataclasses.replace(CONFIG, engram=config)
  made = jax.eval_shape(lambda: nnx.split(Transformer(whole, rngs=nnx.Rngs(0))))
  graph, state = nnx.split(wider)
  assert graph == made[0]
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), (state, made[1]))
  assert shapes[0] == shapes[1]
  assert model.config == CONFIG, "the model itself stays as it is"


def test_another_model_is_refused(model):
  key = jax.random.key(0)
  for change in (
    {"head_dim": 8},
    {"heads": 1},
    {"rows_per_head": (40,)},
    {"rows_per_head": (40, 50, 60)},  # without the old dilation
  ):
    other = dataclasses.replace(CONFIG.engram, **change)
    with pytest.raises(InputError, match="config"):
      grow_transformer(model, other, key=key)
  plain = dataclasses.replace(CONFIG, engram=None, num_layers=1)
  with pytest.raises(InputError, match="a memory to grow"):
    made = Transformer(plain, rngs=nnx.Rngs(0))
    grow_transformer(made, CONFIG.engram, key=key)
