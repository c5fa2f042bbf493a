"""YaRN against DeepSeek's procedure, pair by pair in float64."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.backbone.attention import LatentAttention
from engram_jax.backbone.layers import rotary_frequencies
from engram_jax.backbone.yarn import yarn_frequencies, yarn_softmax_factor
from engram_jax.config import AttentionConfig, YarnConfig
from engram_jax.errors import InputError

PAPER = YarnConfig()


def by_hand(dim, theta, config):
  """The ramp over pair indices, in plain Python."""

  def index(turns):
    ratio = config.original_length / (turns * 2 * math.pi)
    return (dim * math.log(ratio)) / (2 * math.log(theta))

  low = max(math.floor(index(config.fast_turns)), 0)
  high = min(math.ceil(index(config.slow_turns)), dim - 1)
  if low == high:
    high += 0.001
  result = []
  for i in range(dim // 2):
    original = 1.0 / theta ** (2 * i / dim)
    ramp = (i - low) / (high - low)
    ramp = 0.0 if ramp < 0 else 1.0 if ramp > 1 else ramp
    result.append(original / config.scale * ramp + original * (1 - ramp))
  return np.array(result)


@pytest.mark.parametrize(
  "dim, theta, options",
  [
    (64, 1e4, {}),
    (64, 1e4, {"scale": 40.0, "slow_turns": 2.0, "fast_turns": 20.0}),
    (32, 5e5, {"original_length": 8192, "scale": 3.5}),
    # Every pair turns less than `fast_turns`: the ramp starts at the first.
    (8, 50.0, {"original_length": 16, "scale": 4.0}),
    # The ramp's two ends are the same pair.
    (8, 1e4, {"original_length": 6, "scale": 4.0}),
  ],
)
def test_frequencies_equal_the_procedure(dim, theta, options):
  config = YarnConfig(**options)
  found = yarn_frequencies(dim, theta, config)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, by_hand(dim, theta, config), rtol=2e-6)


def test_the_papers_ramp():
  found = np.asarray(yarn_frequencies(64, 1e4, PAPER), np.float64)
  original = 1e4 ** (-np.arange(32) / 32)
  turns = 4096 * original / (2 * math.pi)
  # Pair 10 turns 36.7 times, pair 11 27.5; pair 22 1.16 times, pair 23 0.87.
  assert turns[10] > 32 > turns[11] and turns[22] > 1 > turns[23]
  ratio = found / original
  np.testing.assert_allclose(ratio[:11], 1, rtol=1e-6)
  np.testing.assert_allclose(ratio[23:], 0.1, rtol=1e-6)
  # 13 steps from 1 down to 1/s.
  np.testing.assert_allclose(np.diff(ratio[10:24]), -0.9 / 13, rtol=1e-4)


def test_fast_pairs_are_kept_to_the_bit():
  found, original = (
    yarn_frequencies(64, 1e4, PAPER),
    rotary_frequencies(64, 1e4),
  )
  np.testing.assert_array_equal(found[:11], original[:11])


def test_scale_1_and_none_are_the_original():
  original = rotary_frequencies(64, 1e4)
  same = YarnConfig(scale=1.0)
  for config in (same, None):
    np.testing.assert_array_equal(yarn_frequencies(64, 1e4, config), original)
    assert yarn_softmax_factor(config) == 1.0


def test_pairs_that_all_turn_fast_are_all_kept():
  # DeepSeek's ramp, whose lower end is not clipped, turns around here.
  config = YarnConfig(original_length=10**6, scale=8.0)
  found = yarn_frequencies(8, 2.0, config)
  np.testing.assert_array_equal(found, rotary_frequencies(8, 2.0))


def test_softmax_factor_of_the_papers_constants():
  assert yarn_softmax_factor(PAPER) == pytest.approx(1.3520870168, abs=1e-10)
  forty = YarnConfig(scale=40.0, temperature=1.0)
  assert yarn_softmax_factor(forty) == pytest.approx(1.8738542, abs=1e-7)


def test_bad_arguments_are_refused():
  with pytest.raises(InputError, match=r"rope_theta: 1\.0; valid"):
    yarn_frequencies(8, 1.0, PAPER)
  with pytest.raises(InputError, match="rotary width: 7; valid: an even"):
    yarn_frequencies(7, 1e4, PAPER)


STRETCHED = AttentionConfig(
  num_heads=3,
  nope_dim=6,
  rope_dim=8,
  value_dim=5,
  kv_rank=7,
  rope_theta=50.0,
  yarn=YarnConfig(original_length=16, scale=4.0, fast_turns=2.0),
)


apply = jax.jit(lambda layer, x, **options: layer(x, **options))


@functools.cache
def attention(config):
  return LatentAttention(
    12, config, norm_eps=1e-3, init_std=0.5, dtype="float32", rngs=nnx.Rngs(0)
  )


def sequence(length=9):
  x = np.random.default_rng(1).normal(size=(2, length, 12))
  positions = jnp.broadcast_to(jnp.arange(length), (2, length))
  return jnp.asarray(x, jnp.float32), positions


def test_attention_uses_the_frequencies_and_the_factor():
  x, positions = sequence()
  found, _ = apply(attention(STRETCHED), x, positions=positions)
  w = {
    name: np.asarray(getattr(attention(STRETCHED), name)[...], np.float64)
    for name in ("kv_down", "key_up", "value_up", "key_rope", "query", "out")
  }
  theta = by_hand(8, 50.0, STRETCHED.yarn)
  factor = (0.1 * 0.707 * math.log(4) + 1) ** 2
  x = np.asarray(x, np.float64)

  def turned(v, p):
    """`v`, `[..., 8]`, as four complex numbers turned to position `p`."""
    return (v[..., :4] + 1j * v[..., 4:]) * np.exp(1j * p * theta)

  latent = x @ w["kv_down"]
  latent /= np.sqrt(np.mean(latent**2, axis=-1, keepdims=True) + 1e-3)
  expected = np.zeros_like(x)
  for b, last, h in np.ndindex(2, 9, 3):
    q = x[b, last] @ w["query"][:, h]
    scores = []
    for s in range(last + 1):
      near = turned(q[6:], last) * turned(x[b, s] @ w["key_rope"], s).conj()
      plain = q[:6] @ (latent[b, s] @ w["key_up"][:, h])
      scores.append(factor / math.sqrt(14) * (plain + near.real.sum()))
    weights = np.exp(scores) / np.exp(scores).sum()
    mixed = weights @ latent[b, : last + 1] @ w["value_up"][:, h]
    expected[b, last] += mixed @ w["out"][h]
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("block_size", [0, 2])
def test_prefill_and_steps_equal_the_sequence(block_size):
  layer = attention(dataclasses.replace(STRETCHED, block_size=block_size))
  x, positions = sequence()
  expected, _ = apply(attention(STRETCHED), x, positions=positions)
  whole, _ = apply(layer, x, positions=positions)
  cache = layer.init_cache(2, 11, "float32")
  first, cache = apply(layer, x[:, :5], positions=positions[:, :5], cache=cache)
  outputs = [first]
  for t in range(5, 9):
    at = slice(t, t + 1)
    y, cache = apply(layer, x[:, at], positions=positions[:, at], cache=cache)
    outputs.append(y)
  for y in (whole, jnp.concatenate(outputs, axis=1)):
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("scale", [1.0, 1e30, 3e38])
@pytest.mark.parametrize("theta", [1.0001, 1e4, 1e30])
def test_frequencies_and_factor_are_finite_at_the_ends(scale, theta):
  config = YarnConfig(scale=scale)
  frequencies = yarn_frequencies(8, theta, config)
  assert jnp.isfinite(frequencies).all()
  assert ((frequencies >= 0) & (frequencies <= 1)).all()
  assert np.isfinite(yarn_softmax_factor(config))
