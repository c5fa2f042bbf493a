"""Latent attention: an oracle in NumPy, its two forms, its cache, its masks."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.backbone.attention import (
  LatentAttention,
  LatentCache,
  causal_mask,
  core_attention,
  heads_of_latent,
  latent_attention_absorbed,
  plain_attention,
  write_cache,
)
from engram_jax.backbone.blockwise_attention import blockwise_attention
from engram_jax.config import AttentionConfig
from engram_jax.errors import InputError

WIDTH = 12
CONFIG = AttentionConfig(
  num_heads=3, nope_dim=6, rope_dim=4, value_dim=5, kv_rank=7, rope_theta=50.0
)
# Values as wide as keys: `jax.nn.dot_product_attention` takes it.
SQUARE = dataclasses.replace(CONFIG, value_dim=10)
CONFIGS = pytest.mark.parametrize("config", [CONFIG, SQUARE], ids=["5", "10"])


# Compiled once for all tests: op by op they take three times longer.
apply = jax.jit(lambda layer, x, **options: layer(x, **options))


def normal(seed, *shape):
  return jnp.asarray(
    np.random.default_rng(seed).normal(size=shape), jnp.float32
  )


@functools.cache
def make(config=CONFIG, dtype="float32"):
  layer = LatentAttention(
    WIDTH, config, norm_eps=1e-3, init_std=0.5, dtype=dtype, rngs=nnx.Rngs(0)
  )
  layer.kv_norm.scale[...] = 1 + 0.3 * normal(9, config.kv_rank)
  return layer


def counting(batch, length, start=0):
  return jnp.broadcast_to(start + jnp.arange(length), (batch, length))


def numpy_attention(layer, x, positions, segments):
  """The equations of V2 §2.1 in float64, one query and one head at a time."""
  c = layer.config
  w = {
    name: np.asarray(getattr(layer, name)[...], np.float64)
    for name in ("kv_down", "key_up", "value_up", "key_rope", "query", "out")
  }
  x = np.asarray(x, np.float64)

  def turn(v, p):
    half = c.rope_dim // 2
    theta = c.rope_theta ** (-2 * np.arange(half) / c.rope_dim)
    z = (v[:half] + 1j * v[half:]) * np.exp(1j * p * theta)
    return np.concatenate([z.real, z.imag])

  latent = x @ w["kv_down"]
  root = np.sqrt(np.mean(latent**2, axis=-1, keepdims=True) + 1e-3)
  latent = latent / root * np.asarray(layer.kv_norm.scale[...], np.float64)
  y = np.zeros_like(x)
  for b, length in np.ndindex(x.shape[:2]):
    seen = [
      s for s in range(length + 1) if segments[b, s] == segments[b, length]
    ]
    for h in range(c.num_heads):
      q = x[b, length] @ w["query"][:, h]
      q_rope = turn(q[c.nope_dim :], positions[b, length])
      scores = np.array(
        [
          q[: c.nope_dim] @ (latent[b, s] @ w["key_up"][:, h])
          + q_rope @ turn(x[b, s] @ w["key_rope"], positions[b, s])
          for s in seen
        ]
      ) / math.sqrt(c.nope_dim + c.rope_dim)
      a = np.exp(scores - scores.max())
      a /= a.sum()
      o = sum(
        a[i] * (latent[b, s] @ w["value_up"][:, h]) for i, s in enumerate(seen)
      )
      y[b, length] += o @ w["out"][h]
  return y


@CONFIGS
def test_equals_the_equations_in_float64(config):
  layer = make(config)
  x = normal(1, 2, 7, WIDTH)
  positions = np.array([range(7), [0, 1, 2, 0, 1, 0, 1]])
  segments = np.array([[0] * 7, [0, 0, 0, 1, 1, 2, 2]])
  y, cache = apply(
    layer, x, positions=jnp.asarray(positions), segments=jnp.asarray(segments)
  )
  assert cache is None
  expected = numpy_attention(layer, x, positions, segments)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=2e-5)


def operands(seed=2, length=5, keys=5):
  key = iter(range(seed, seed + 9))
  c = CONFIG
  return (
    normal(next(key), 2, length, c.num_heads, c.nope_dim),
    normal(next(key), 2, length, c.num_heads, c.rope_dim),
    normal(next(key), 2, keys, c.kv_rank),
    normal(next(key), 2, keys, c.rope_dim),
    normal(next(key), c.kv_rank, c.num_heads, c.nope_dim),
    normal(next(key), c.kv_rank, c.num_heads, c.value_dim),
  )


def test_absorbed_equals_full_in_values_and_gradients():
  mask = jnp.array([[0, 0, 0, 1, 1], [0, 0, 1, 1, 1]])
  mask = causal_mask(5, mask)

  def in_full(*arrays, **options):
    *arrays, mask = arrays
    return core_attention(*heads_of_latent(*arrays), mask, **options)

  def loss(form, *arrays):
    out = form(*arrays, mask, scale=0.3)
    return jnp.sum(jnp.sin(out)), out

  results = [
    jax.jit(
      jax.value_and_grad(
        lambda arrays, form=form: loss(form, *arrays), has_aux=True
      )
    )(operands())
    for form in (in_full, latent_attention_absorbed)
  ]
  for full, absorbed in zip(*map(jax.tree.leaves, results)):
    np.testing.assert_allclose(full, absorbed, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dot_product_attention_equals_plain(dtype):
  query, key, value = (normal(s, 2, 6, 3, 8).astype(dtype) for s in range(3))
  segments = jnp.array([[0, 0, 0, 0, 1, 1], [0, 1, 1, 2, 2, 2]])
  for mask in (causal_mask(6), causal_mask(6, segments)):

    def run(form, mask=mask):
      def loss(arrays):
        out = form(*arrays, mask, scale=0.35)
        return jnp.sum(out.astype(jnp.float32) ** 2), out

      grads = jax.jit(jax.value_and_grad(loss, has_aux=True))
      return grads((query, key, value))

    pairs = zip(
      *map(jax.tree.leaves, (run(plain_attention), run(core_attention)))
    )
    tolerance = 1e-5 if dtype == jnp.float32 else 5e-2
    for plain, fast in pairs:
      assert plain.dtype == fast.dtype
      np.testing.assert_allclose(
        np.float32(plain), np.float32(fast), rtol=tolerance, atol=tolerance
      )


@CONFIGS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prefill_and_steps_equal_the_sequence(config, dtype):
  layer = make(config, dtype)
  x = normal(3, 2, 9, WIDTH)
  expected, _ = apply(layer, x, positions=counting(2, 9))
  cache = layer.init_cache(2, 11, dtype)
  first, cache = apply(layer, x[:, :4], positions=counting(2, 4), cache=cache)
  outputs = [first]
  for t in range(4, 9):
    now = counting(2, 1, t)
    y, cache = apply(layer, x[:, t : t + 1], positions=now, cache=cache)
    outputs.append(y)
  tolerance = 2e-5 if dtype == "float32" else 0.15
  y = jnp.concatenate(outputs, axis=1)
  assert y.dtype == expected.dtype == dtype
  np.testing.assert_allclose(
    np.float32(y), np.float32(expected), rtol=tolerance, atol=tolerance
  )
  assert not np.asarray(cache.latent, np.float32)[:, 9:].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_blocks_equals_at_once(dtype):
  """A block size changes how it is computed, not what."""
  x = normal(11, 2, 9, WIDTH)
  positions = counting(2, 9).at[0].set(jnp.arange(9) % 5)
  segments = (jnp.arange(9) // 5) * jnp.array([[1], [0]])

  def results(config):
    layer = make(config, dtype)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(layer, x):
      y, _ = layer(x, positions=positions, segments=segments)
      return jnp.mean(y.astype(jnp.float32) ** 2), y

    cache = layer.init_cache(2, 12, dtype)
    prefill = apply(layer, x, positions=counting(2, 9), cache=cache)
    return jax.tree.leaves((run(layer, x), prefill))

  tolerance = 2e-5 if dtype == "float32" else 0.1
  blocks = dataclasses.replace(CONFIG, block_size=4)
  for found, expected in zip(results(blocks), results(CONFIG), strict=True):
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(
      np.float32(found), np.float32(expected), rtol=tolerance, atol=tolerance
    )


def test_a_long_prompt_in_blocks_takes_no_square_of_memory():
  def temporary_bytes(block_size, length):
    layer = make(dataclasses.replace(CONFIG, block_size=block_size))
    cache = jax.eval_shape(lambda: layer.init_cache(1, length, "float32"))
    x = jax.ShapeDtypeStruct((1, length, WIDTH), jnp.float32)
    lowered = apply.lower(layer, x, positions=counting(1, length), cache=cache)
    return lowered.compile().memory_analysis().temp_size_in_bytes

  sizes = [temporary_bytes(128, length) for length in (1024, 2048)]
  assert sizes[1] < 2.1 * sizes[0] < temporary_bytes(0, 1024) / 2


def test_prompts_of_unequal_length_share_a_batch():
  # The prompts are longer than a block, the steps shorter.
  layer = make(dataclasses.replace(CONFIG, block_size=2))
  x = normal(4, 3, 8, WIDTH)
  lengths = np.array([5, 2, 3])
  whole, _ = apply(make(), x, positions=counting(3, 8))
  # Right-padded: what stands behind a prompt is noise, written to the cache.
  inside = np.arange(5) < lengths[:, None]
  padded = jnp.where(inside[..., None], x[:, :5], 100 * normal(5, 3, 5, WIDTH))
  cache = layer.init_cache(3, 8, "float32")
  y, cache = apply(layer, padded, positions=counting(3, 5), cache=cache)
  np.testing.assert_allclose(y[inside], whole[:, :5][inside], atol=2e-5)
  for step in range(3):
    positions = lengths + step
    token = x[np.arange(3), positions][:, None]
    now = jnp.asarray(positions)[:, None]
    y, cache = apply(layer, token, positions=now, cache=cache)
    np.testing.assert_allclose(
      y[:, 0], whole[np.arange(3), positions], rtol=2e-5, atol=2e-5
    )


def test_positions_outside_the_cache_write_nothing():
  cache = LatentCache(jnp.zeros((2, 3, 2)), jnp.zeros((2, 3, 1)))
  new = LatentCache(1 + jnp.zeros((2, 2, 2)), 2 + jnp.zeros((2, 2, 1)))
  written = write_cache(cache, *new, jnp.array([[2, 3], [-1, 0]]))
  np.testing.assert_array_equal(
    written.latent[..., 0], [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
  )
  np.testing.assert_array_equal(
    written.rope_key[..., 0], [[0.0, 0.0, 2.0], [2.0, 0.0, 0.0]]
  )


def test_a_position_before_the_cache_gives_finite_numbers():
  layer = make()
  x = normal(6, 1, 1, WIDTH)
  cache = layer.init_cache(1, 3, "float32")
  y, _ = apply(layer, x, positions=jnp.array([[-1]]), cache=cache)
  assert jnp.isfinite(y).all()


@CONFIGS
def test_a_future_token_changes_nothing_before_it(config):
  layer = make(config)
  x = normal(7, 2, 6, WIDTH)
  changed = x.at[:, 4].add(10.0)
  before, _ = apply(layer, x, positions=counting(2, 6))
  after, _ = apply(layer, changed, positions=counting(2, 6))
  np.testing.assert_array_equal(before[:, :4], after[:, :4])
  assert (np.abs(before[:, 4:] - after[:, 4:]).max(axis=-1) > 1e-3).all()


@CONFIGS
def test_packed_documents_equal_documents_alone(config):
  layer = make(config)
  x = normal(8, 1, 9, WIDTH)
  positions = jnp.array([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
  segments = jnp.array([[5] * 4 + [2] * 5])
  packed, _ = apply(layer, x, positions=positions, segments=segments)
  for start, end in ((0, 4), (4, 9)):
    part, places = x[:, start:end], counting(1, end - start)
    alone, _ = apply(layer, part, positions=places)
    np.testing.assert_allclose(
      packed[:, start:end], alone, rtol=2e-5, atol=2e-5
    )
  leaking, _ = apply(layer, x, positions=positions)
  assert np.abs(leaking[:, 4:] - packed[:, 4:]).max() > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_finite_and_reach_every_parameter(dtype):
  layer = make(SQUARE, dtype)
  x = normal(10, 2, 5, WIDTH)

  @jax.jit
  @jax.grad
  def grads(layer):
    y, _ = layer(x, positions=counting(2, 5))
    assert y.dtype == dtype
    return jnp.mean(y.astype(jnp.float32) ** 2)

  found = jax.tree.leaves(grads(layer))
  assert len(found) == 7
  for grad in found:
    assert grad.dtype == jnp.float32
    assert jnp.isfinite(grad).all() and jnp.abs(grad).max() > 0


def test_bad_arguments_are_refused():
  layer = make()
  x, positions = jnp.ones((1, 2, WIDTH)), counting(1, 2)
  cache = layer.init_cache(1, 4, "float32")
  with pytest.raises(
    InputError, match="segments: given with a cache; valid: None"
  ):
    layer(x, positions=positions, segments=positions, cache=cache)
  with pytest.raises(
    InputError, match=r"x.shape: \(1, 2, 5\); valid: \[..., 12\]"
  ):
    layer(x[..., :5], positions=positions)
  with pytest.raises(InputError, match=r"cache.latent.shape: \(2, 4, 7\)"):
    wide = layer.init_cache(2, 4, "float32")
    layer(x, positions=positions, cache=wide)
  with pytest.raises(InputError, match="capacity: 0"):
    layer.init_cache(1, 0, "float32")
  with pytest.raises(InputError, match="batch: 0"):
    layer.init_cache(0, 1, "float32")
  with pytest.raises(InputError, match="dtype: int8; valid: one of float32"):
    layer.init_cache(1, 4, "int8")
  with pytest.raises(InputError, match="dtype: float64"):
    make(dtype="float64")


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e18])
@pytest.mark.parametrize("width", [4, 6])
def test_rows_that_see_no_key_and_scores_of_any_size_are_finite(size, width):
  draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
  query, key = size * draw(0, 1, 3, 2, 4), size * draw(1, 1, 3, 2, 4)
  value = draw(2, 1, 3, 2, width)
  # The first query sees no key.
  mask = jnp.tril(jnp.ones((1, 3, 3), bool), -1)
  last_key = jnp.arange(3)[None] - 1

  def dense(*operands):
    return core_attention(*operands, mask, scale=0.5)

  def blocks(*operands):
    return blockwise_attention(*operands, last_key, scale=0.5, block_size=2)

  for form in (dense, blocks):
    loss = lambda *operands, form=form: jnp.sum(jnp.sin(form(*operands)[:, 1:]))
    slopes = jax.grad(loss, argnums=(0, 1, 2))(query, key, value)
    for array in (form(query, key, value), *slopes):
      assert jnp.isfinite(array).all()
  np.testing.assert_allclose(
    dense(query, key, value)[:, 1:], blocks(query, key, value)[:, 1:], rtol=1e-4
  )
