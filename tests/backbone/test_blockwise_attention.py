"""Attention in blocks: the plain one's values, gradients and masks, less room.

Sizes are of 1 batch of 2 and 3 heads, keys 6 wide and values 5, unless said.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.backbone.attention import causal_mask, plain_attention
from engram_jax.backbone.blockwise_attention import blockwise_attention
from engram_jax.errors import InputError

SCALE = 0.4
# Documents whose borders lie on a block's border, within blocks, and one that
# spans three blocks of 4.
SEGMENTS = jnp.array([[0] * 4 + [1] * 2 + [2] * 7, [3] + [1] * 10 + [0] * 2])


def normal(seed, *shape):
  return jnp.asarray(
    np.random.default_rng(seed).normal(size=shape), jnp.float32
  )


def operands(length=13, keys=None, dtype=jnp.float32, batch=2):
  keys = length if keys is None else keys
  shapes = ((length, 3, 6), (keys, 3, 6), (keys, 3, 5))
  return tuple(
    normal(seed, batch, *shape).astype(dtype)
    for seed, shape in enumerate(shapes)
  )


def own_past(length):
  return jnp.arange(length)[None]


# Compiled also where it stands alone: op by op it takes three times longer.
@functools.partial(jax.jit, static_argnums=1)
def causal(arrays, block_size, segments=None):
  return blockwise_attention(
    *arrays,
    own_past(arrays[0].shape[1]),
    segments,
    scale=SCALE,
    block_size=block_size,
  )


@jax.jit
def plain_causal(arrays, segments=None):
  mask = causal_mask(arrays[0].shape[1], segments)
  return plain_attention(*arrays, mask, scale=SCALE)


def value_and_gradients(form, arrays):
  """The output, and the gradients of a sum that weighs each number its own."""

  @functools.partial(jax.value_and_grad, has_aux=True)
  def loss(arrays):
    out = form(arrays)
    factor = normal(9, *out.shape)
    return jnp.sum(jnp.sin(out.astype(jnp.float32)) * factor), out

  (_, out), gradients = jax.jit(loss)(arrays)
  return out, *gradients


def assert_equal_to_plain(form, plain, arrays, tolerance=1e-5):
  results = (value_and_gradients(f, arrays) for f in (form, plain))
  for found, expected in zip(*results):
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(
      np.float32(found), np.float32(expected), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("block_size", [1, 4, 13, 50])
def test_packed_equals_plain_in_values_and_gradients(block_size):
  assert_equal_to_plain(
    lambda arrays: causal(arrays, block_size, SEGMENTS),
    lambda arrays: plain_causal(arrays, SEGMENTS),
    operands(),
  )


@pytest.mark.parametrize("length", [1, 3, 8, 9])
def test_any_length(length):
  assert_equal_to_plain(
    lambda arrays: causal(arrays, 4), plain_causal, operands(length)
  )


def test_bfloat16():
  arrays = operands(dtype=jnp.bfloat16)
  assert_equal_to_plain(
    lambda arrays: causal(arrays, 4, SEGMENTS),
    lambda arrays: plain_causal(arrays, SEGMENTS),
    arrays,
    tolerance=4e-2,
  )
  # Its sums are float32: no farther from the truth than a rounding or two.
  exact = plain_causal(tuple(x.astype(jnp.float32) for x in arrays))
  found = causal(arrays, 1)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float32(found), exact, rtol=1e-2, atol=1e-2)


def test_large_scores_do_not_overflow():
  query, key, value = operands()
  arrays = (query * 300, key, value)
  assert_equal_to_plain(
    lambda arrays: causal(arrays, 4), plain_causal, arrays, tolerance=1e-4
  )


def test_keys_of_a_cache():
  """Queries at positions of their own over more keys than there are queries."""
  last_key = jnp.array([[3, 4, 5, 6, 7], [0, 1, 2, 3, 4]])
  mask = jnp.arange(11) <= last_key[:, :, None]
  assert_equal_to_plain(
    lambda arrays: blockwise_attention(
      *arrays, last_key, scale=SCALE, block_size=2
    ),
    lambda arrays: plain_attention(*arrays, mask, scale=SCALE),
    operands(5, keys=11),
  )


def test_an_index_beyond_the_keys_means_the_last_and_a_negative_one_none():
  arrays = operands(3, keys=5)
  found = value_and_gradients(
    lambda arrays: blockwise_attention(
      *arrays, jnp.array([[-7, 2, 99]]), scale=SCALE, block_size=2
    ),
    arrays,
  )
  mask = jnp.arange(5) <= jnp.array([[[-1], [2], [4]]])
  expected = plain_attention(*arrays, mask, scale=SCALE)
  np.testing.assert_array_equal(found[0][:, 0], 0)
  np.testing.assert_allclose(found[0][:, 1:], expected[:, 1:], atol=1e-5)
  assert all(jnp.isfinite(array).all() for array in found)
  np.testing.assert_array_equal(found[1][:, 0], 0)


def test_a_future_token_changes_nothing_before_it():
  arrays = operands()
  before = causal(arrays, 4)
  for at in (4, 6):
    after = causal(tuple(x.at[:, at].add(3.0) for x in arrays), 4)
    np.testing.assert_array_equal(before[:, :at], after[:, :at])
    assert (np.abs(before - after)[:, at:].max(axis=(2, 3)) > 1e-4).all()


def test_packed_documents_equal_documents_alone():
  arrays = operands()
  packed = causal(arrays, 4, SEGMENTS)
  for start, end in ((0, 4), (4, 6), (6, 13)):
    alone = causal(tuple(x[:1, start:end] for x in arrays), 4)
    np.testing.assert_allclose(packed[:1, start:end], alone, atol=1e-5)


def test_blocks_behind_the_diagonal_are_not_computed():
  """A weight of 0 times NaN is NaN: what is finite was never multiplied."""
  arrays = operands(12)
  poisoned = tuple(array.at[:, 8:].set(jnp.nan) for array in arrays)
  out, *gradients = value_and_gradients(
    lambda arrays: causal(arrays, 4), arrays
  )
  assert all(jnp.isfinite(array).all() for array in (out, *gradients))

  np.testing.assert_array_equal(causal(poisoned, 4)[:, :8], out[:, :8])

  def d_query(arrays):
    loss = lambda query: jnp.sum(causal((query, *arrays[1:]), 4)[:, :8] ** 2)
    return jax.grad(loss)(arrays[0])[:, :8]

  # The queries are clean, so that only keys and values can spoil anything.
  spoilt = d_query((arrays[0], *poisoned[1:]))
  np.testing.assert_array_equal(spoilt, d_query(arrays))
  # Within a block of the diagonal the mask alone decides, and NaN spreads.
  assert jnp.isnan(causal(poisoned, 12)[:, :8]).all()


def test_memory_grows_with_the_length():
  def temporary_bytes(form, length):
    @jax.jit
    @jax.grad
    def gradients(arrays, segments):
      return jnp.sum(form(arrays, segments=segments) ** 2)

    shapes = [(1, length, 2, width) for width in (12, 12, 8)]
    arrays = tuple(jax.ShapeDtypeStruct(x, jnp.float32) for x in shapes)
    segments = jax.ShapeDtypeStruct((1, length), jnp.int32)
    compiled = gradients.lower(arrays, segments).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  def blockwise(arrays, segments):
    return causal(arrays, 128, segments)

  sizes = [temporary_bytes(blockwise, length) for length in (1024, 2048, 4096)]
  assert sizes[1] < 2.1 * sizes[0] and sizes[2] < 2.1 * sizes[1]
  # Two heads' scores alone, once.
  assert sizes[2] < 2 * 4096**2 * 4 / 8
  # The measure sees the square where there is one.
  plain = [temporary_bytes(plain_causal, length) for length in (1024, 2048)]
  assert plain[1] > 3.5 * plain[0]


@pytest.mark.parametrize("policy", [None, "dots_saveable"])
def test_inside_a_scan_that_computes_again(policy):
  """As the model's blocks are looped over, with less kept for the gradient."""
  query, key, value = operands(9)
  value = normal(8, *key.shape)
  scales = jnp.array([0.5, 1.0, 1.5])
  if policy is not None:
    policy = getattr(jax.checkpoint_policies, policy)

  def stack(form):
    def layer(x, scale):
      return x + form((x * scale, key, value)), None

    layer = jax.checkpoint(layer, policy=policy)

    def loss(query):
      return jnp.sum(jnp.sin(jax.lax.scan(layer, query, scales)[0]))

    return jax.jit(jax.value_and_grad(loss))(query)

  results = stack(lambda arrays: causal(arrays, 4)), stack(plain_causal)
  for found, expected in zip(*results):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_bad_arguments_are_refused():
  with pytest.raises(InputError, match="block_size: 0; valid: a number above"):
    causal(operands(), 0)
  with pytest.raises(InputError, match="segments: given with 3 queries and 5"):
    blockwise_attention(
      *operands(3, keys=5),
      own_past(3),
      jnp.zeros((2, 3), int),
      scale=1.0,
      block_size=2,
    )
