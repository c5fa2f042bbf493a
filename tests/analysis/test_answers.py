"""Answers are scored token by token, and where nothing is asked not at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.analysis.answers import answer_divergence, score_answers
from engram_jax.backbone.transformer import Transformer
from engram_jax.config import AttentionConfig, EngramConfig, ModelConfig
from engram_jax.memory.memory import Memory

VOCAB, WIDTH = 30, 8
CONFIG = ModelConfig(
  vocab_size=VOCAB,
  hidden_size=WIDTH,
  num_layers=1,
  attention=AttentionConfig(
    num_heads=2, nope_dim=4, rope_dim=2, value_dim=4, kv_rank=4
  ),
  dense_size=16,
  init_std=0.5,
  engram=EngramConfig(
    hidden_size=WIDTH,
    layers=(0,),
    rows_per_head=(40,),
    heads=2,
    head_dim=4,
    table_init_std=1.0,
  ),
)


@pytest.fixture(scope="module")
def parts():
  """A model, its memory, its tables."""
  model = Transformer(CONFIG, rngs=nnx.Rngs(0))
  memory = Memory.create(CONFIG.engram, vocab_size=VOCAB)
  return model, memory, memory.init_tables(jax.random.key(0))


@pytest.fixture(scope="module")
def batch(parts):
  """The model's own best answers, but for a wrong one in the second row."""
  model, memory, tables = parts
  rng = np.random.default_rng(0)
  inputs = jnp.asarray(rng.integers(0, VOCAB, (4, 6)), jnp.int32)
  breaks = jnp.zeros((4, 6), jnp.int8)
  rows = memory.lookup(tables, inputs, breaks=breaks).rows
  logits = jax.jit(lambda m, r: m(inputs, r, breaks=breaks).logits)(model, rows)
  best = jnp.argmax(logits, axis=-1)
  targets = best.at[1, 4].set((best[1, 4] + 1) % VOCAB)
  targets = targets.at[2, 0].set((best[2, 0] + 1) % VOCAB)  # not asked for
  mask = np.zeros((4, 6), bool)
  mask[:3, 3:5] = True
  batch = {"inputs": inputs, "targets": targets.astype(jnp.int32)}
  batch |= {"breaks": breaks, "loss_mask": jnp.asarray(mask)}
  return batch, jax.nn.log_softmax(logits)


def test_all_tokens_of_an_answer_must_be_right(parts, batch):
  model, memory, tables = parts
  batch, log_p = batch
  found = score_answers(model, memory, tables, batch)
  np.testing.assert_array_equal(found.is_right, [True, False, True, True])
  picked = np.take_along_axis(
    np.asarray(log_p), np.asarray(batch["targets"])[..., None], axis=-1
  )[..., 0]
  expected = np.where(batch["loss_mask"], picked, 0).sum(axis=1)
  np.testing.assert_allclose(found.log_likelihood, expected, rtol=1e-4)
  assert found.log_likelihood[3] == 0, "nothing is asked there"


def test_the_memory_may_be_off(parts, batch):
  model, memory, tables = parts
  on = score_answers(model, memory, tables, batch[0])
  off = score_answers(model, memory, None, batch[0])
  assert np.abs(on.log_likelihood - off.log_likelihood)[:3].min() > 1e-4


def test_divergence_is_that_of_the_answers(parts, batch):
  model, memory, tables = parts
  batch, log_p = batch
  same = answer_divergence(model, tables, model, tables, memory, batch)
  np.testing.assert_allclose(same, 0, atol=1e-6)
  other = {0: -tables[0]}
  found = answer_divergence(model, tables, model, other, memory, batch)
  rows = memory.lookup(other, batch["inputs"], breaks=batch["breaks"]).rows
  out = jax.jit(lambda m, r: m(batch["inputs"], r, breaks=batch["breaks"]))
  after = np.asarray(jax.nn.log_softmax(out(model, rows).logits))
  before = np.asarray(log_p)
  by_token = (np.exp(before) * (before - after)).sum(axis=-1)
  np.testing.assert_allclose(
    found[:3], by_token[:3, 3:5].mean(axis=1), rtol=1e-3, atol=1e-6
  )
  assert found[:3].min() > 1e-4 and found[3] == 0
