"""Tests of the loss in chunks against the one of whole logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.analysis.compiled import memory_report
from engram_jax.errors import InputError
from engram_jax.stores.program_stores import TableStore
from engram_jax.training.evaluation import batch_losses
from engram_jax.training.losses import chunked_cross_entropy, cross_entropy
from engram_jax.training.state import flatten
from engram_jax.training.step import make_train_step

B, L, D, V = 3, 7, 8, 40


def draw(dtype="float32", *, shape=(B, L), width=D, vocab=V):
  """Hidden states, matrix, targets, mask."""
  rng = np.random.default_rng(0)
  return (
    jnp.asarray(rng.normal(size=(*shape, width)), dtype),
    jnp.asarray(rng.normal(size=(vocab, width)), jnp.float32),
    jnp.asarray(rng.integers(0, vocab, shape), jnp.int32),
    jnp.asarray(rng.random(shape) < 0.8),
  )


def plain(hidden, matrix, targets, mask, *, dtype="float32"):
  """From whole logits."""
  logits = jnp.einsum(
    "bld,vd->blv",
    hidden,
    matrix.astype(dtype),
    preferred_element_type=jnp.float32,
  )
  return cross_entropy(logits, targets, mask)


@functools.cache
def value_and_grad(loss, **options):
  return jax.jit(
    jax.value_and_grad(functools.partial(loss, **options), argnums=(0, 1))
  )


def chunked(chunk, dtype="float32"):
  return value_and_grad(chunked_cross_entropy, chunk=chunk, dtype=dtype)


# --- whole logits ---


def test_cross_entropy_by_hand():
  logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]]))
  targets = jnp.array([[1, 2]])
  for mask, expected in (
    ([[True, True]], -np.log(0.25) - np.log(0.7)),
    ([[False, True]], -np.log(0.7)),
    ([[False, False]], 0.0),
  ):
    found = cross_entropy(logits, targets, jnp.array(mask))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_masked_position_may_hold_anything():
  logits = jnp.array([[[0.0, jnp.inf], [0.0, 0.0]]])
  mask = jnp.array([[False, True]])
  found = cross_entropy(logits, jnp.array([[0, 0]]), mask)
  np.testing.assert_allclose(found, np.log(2), rtol=1e-6)


# --- chunks ---


# 21 tokens: one at a time, chunks that fit, that do not, one larger than all.
@pytest.mark.parametrize("chunk", [1, 7, 4, 100])
def test_chunks_change_nothing(chunk):
  arrays = draw()
  expected, by = value_and_grad(plain)(*arrays)
  found, found_by = chunked(chunk)(*arrays)
  assert found.dtype == jnp.float32 and found.shape == ()
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  for one, other in zip(found_by, by, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_compute_in_bfloat16_and_sum_gradients_in_float32():
  arrays = draw("bfloat16", shape=(4, 64))
  expected, (by_hidden, _) = value_and_grad(plain, dtype="bfloat16")(*arrays)
  found, (found_by_hidden, by_matrix) = chunked(2, "bfloat16")(*arrays)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  assert found_by_hidden.dtype == jnp.bfloat16
  np.testing.assert_array_equal(found_by_hidden, by_hidden)
  # The gradient of the matrix, from the same rounded values, in float32.
  hidden, matrix, *rest = arrays
  rounded = matrix.astype(jnp.bfloat16).astype(jnp.float32)
  hidden = hidden.astype(jnp.float32)
  _, (_, exact) = value_and_grad(plain)(hidden, rounded, *rest)
  assert by_matrix.dtype == jnp.float32
  error = jnp.linalg.norm(by_matrix - exact) / jnp.linalg.norm(exact)
  # Summed over its 128 chunks in bfloat16 it would be ten times as far off.
  assert error < 2**-9


def test_nothing_counts_where_all_is_masked():
  hidden, matrix, targets, mask = draw()
  value, gradients = chunked(4)(hidden, matrix, targets, jnp.zeros_like(mask))
  assert value == 0
  assert not any(jnp.any(g) for g in gradients)


def test_what_is_not_finite_at_a_masked_position():
  """Not seen by the loss, but by the gradients: as with whole logits."""
  hidden, matrix, targets, mask = draw()
  mask = mask.at[1, 2].set(False)
  clean, _ = chunked(4)(hidden, matrix, targets, mask)
  hidden = hidden.at[1, 2].set(jnp.nan)
  for loss in (chunked(4), value_and_grad(plain)):
    value, (_, by_matrix) = loss(hidden, matrix, targets, mask)
    np.testing.assert_allclose(value, clean, rtol=1e-6)
    assert jnp.isnan(by_matrix).all()


def test_logits_never_exist_whole():
  def temporaries(loss, length):
    arrays = draw(shape=(2, length), vocab=1024)
    return memory_report(loss.lower(*arrays).compile())["temp"]

  lengths = 128, 512
  whole = [temporaries(value_and_grad(plain), n) for n in lengths]
  pieces = [temporaries(chunked(16), n) for n in lengths]
  logits = 2 * 512 * 1024 * 4
  assert whole[1] >= logits
  assert pieces[1] < logits / 8
  # What grows with the length is of the hidden states' size.
  assert pieces[1] - pieces[0] < 10 * 2 * (512 - 128) * D * 4


def test_a_chunk_has_tokens():
  with pytest.raises(InputError, match=r"^chunk: 0; valid: an integer >= 1$"):
    chunked_cross_entropy(*draw(), chunk=0, dtype="float32")


# --- in training and evaluation ---


@pytest.fixture(scope="module")
def in_chunks(make_tiny):
  """The shared setup, with 48 tokens of a batch by fives."""
  return make_tiny(loss_chunk=5).setup


def test_a_training_step(tiny, train_step, in_chunks, make_batch):
  batch = make_batch()
  state, metrics = train_step(tiny.state(), batch)
  other, found = make_train_step(in_chunks)(tiny.state(), batch)
  for name in ("loss", "grad_norm", "balance_loss"):
    np.testing.assert_allclose(found[name], metrics[name], rtol=1e-5)
  # Adam's first step hides the size of a gradient; its moments do not.
  state, other = flatten(state), flatten(other)
  for name in state:
    if "/mu/" in name:
      scale = np.abs(state[name]).max()
      np.testing.assert_allclose(
        other[name], state[name], atol=1e-5 * scale, err_msg=name
      )


def test_an_evaluation(tiny, in_chunks, make_batch):
  state, batch = tiny.state(), make_batch()
  model = tiny.setup.merge_model(state)
  store = TableStore(state.tables)
  (found,), (expected,) = (
    batch_losses(setup, model, store, [batch])
    for setup in (in_chunks, tiny.setup)
  )
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
  assert found[1] == expected[1]
