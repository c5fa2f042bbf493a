"""Hyper-connections against the equations, token by token in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.backbone.hyper_connections import (
  HyperConnections,
  mixing,
  read,
  sinkhorn,
  write,
)
from engram_jax.errors import InputError

EPS, ITERATIONS = 0.1, 20
OPTIONS = {"eps": EPS, "iterations": ITERATIONS}


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def arguments(g=4, d=6) -> dict:
  """Streams and parameters that mix a lot, and differently at every token."""
  columns = g * (g + 2)
  return {
    "streams": 2 * normal(0, 2, 3, g, d),
    "kernel": 0.3 * normal(1, g * d, columns),
    "scale": jnp.array([0.7, 1.1, 1.3]),
    "bias": normal(2, columns),
  }


def module(g=4, d=6) -> HyperConnections:
  return HyperConnections(d, g, init_std=0.02, rngs=nnx.Rngs(0), **OPTIONS)


def sublayer(x):
  return jnp.tanh(x) + 0.5


@jax.jit
def block(streams, kernel, scale, bias):
  """The `Mixing`, and the streams after the sublayer."""
  mixed = mixing(streams, kernel, scale, bias, **OPTIONS)
  update = sublayer(read(streams, mixed.pre))
  return mixed, write(streams, update, mixed.post, mixed.residual)


# --- the transcription ---


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def token_by_hand(x, kernel, scale, bias):
  """One token's pre, post, residual and next streams."""
  g = x.shape[0]
  flat = x.reshape(-1)
  normed = flat / np.sqrt(np.mean(flat**2) + EPS)
  columns = normed @ kernel
  pre = sigmoid(scale[0] * columns[:g] + bias[:g])
  post = 2 * sigmoid(scale[1] * columns[g : 2 * g] + bias[g : 2 * g])
  residual = np.exp(scale[2] * columns[2 * g :] + bias[2 * g :]).reshape(g, g)
  for _ in range(ITERATIONS):
    residual = residual / residual.sum(axis=0, keepdims=True)
    residual = residual / residual.sum(axis=1, keepdims=True)
  update = np.tanh(pre @ x) + 0.5
  return pre, post, residual, residual @ x + np.outer(post, update)


def by_hand(streams, kernel, scale, bias):
  """The four of `token_by_hand`, each [B, L, ...]."""
  tokens = [
    [token_by_hand(x, kernel, scale, bias) for x in row] for row in streams
  ]
  return [
    np.array([[token[part] for token in row] for row in tokens])
    for part in range(4)
  ]


def float64(arguments):
  return {name: np.asarray(x, np.float64) for name, x in arguments.items()}


@pytest.mark.parametrize("g", [1, 2, 4])
def test_it_is_the_transcription(g):
  given = arguments(g)
  pre, post, residual, streams = by_hand(**float64(given))
  found, written = block(**given)
  tokens_last = lambda x: np.moveaxis(x, (0, 1), (-2, -1))
  np.testing.assert_allclose(found.pre, tokens_last(pre), rtol=2e-5)
  np.testing.assert_allclose(found.post, tokens_last(post), rtol=2e-5)
  np.testing.assert_allclose(found.residual, tokens_last(residual), rtol=5e-5)
  np.testing.assert_allclose(written, streams, rtol=2e-5, atol=2e-5)
  # It does mix, and not every token alike.
  if g > 1:
    assert residual.std(axis=(0, 1)).min() > 0.03


def test_gradients_against_finite_differences_of_the_transcription():
  given = arguments()
  weights = normal(3, *given["streams"].shape)
  weighted = lambda given: jnp.sum(weights * block(**given)[1])
  gradients = jax.jit(jax.grad(weighted))(given)

  def loss(given):
    return np.sum(np.asarray(weights, np.float64) * by_hand(**given)[3])

  for seed, name in enumerate(given):
    exact = float64(given)
    way = np.random.default_rng(seed).normal(size=exact[name].shape)
    ends = [
      loss({**exact, name: exact[name] + step * way}) for step in (1e-5, -1e-5)
    ]
    slope = (ends[0] - ends[1]) / 2e-5
    found = np.sum(np.asarray(gradients[name], np.float64) * way)
    np.testing.assert_allclose(found, slope, rtol=1e-4, err_msg=name)


# --- Sinkhorn ---


def sums(matrix):
  return [np.asarray(matrix, np.float64).sum(axis=i) for i in (0, 1)]


@pytest.mark.parametrize("std, tolerance", [(0.5, 1e-6), (1, 1e-3), (2, 0.05)])
def test_rows_and_columns_sum_to_one(std, tolerance):
  # Of 1000 matrices the worst: the further entries are apart, the slower the
  # columns converge.
  matrix = sinkhorn(std * normal(0, 4, 4, 50, 20), iterations=20)
  columns, rows = sums(matrix)
  np.testing.assert_allclose(rows, 1, atol=3e-6)
  np.testing.assert_allclose(columns, 1, atol=tolerance)
  assert matrix.min() > 0 and matrix.dtype == jnp.float32


@pytest.mark.parametrize(
  "logits",
  [
    300 * normal(1, 4, 4, 40),
    # exp of these is 0 in a whole row, a whole column, everywhere but once.
    normal(2, 4, 4, 40).at[1].add(-1e3),
    normal(3, 4, 4, 40).at[:, 2].add(-1e3),
    jnp.full((4, 4, 40), -1e4).at[0, 0].set(1e4),
  ],
  ids=["wide", "row", "column", "one entry"],
)
def test_extreme_logits_have_sums_and_gradients(logits):
  weights = normal(4, *logits.shape)

  def weighted(logits):
    matrix = sinkhorn(logits, iterations=20)
    return jnp.sum(weights * matrix), matrix

  gradient, matrix = jax.jit(jax.grad(weighted, has_aux=True))(logits)
  columns, rows = sums(matrix)
  np.testing.assert_allclose(rows, 1, atol=3e-6)
  # Of matrices that are all but permutations or have none in them, 20
  # iterations leave columns away from 1; none is lost.
  assert columns.min() > 1 / 16 and columns.max() < 4
  assert jnp.isfinite(gradient).all()


def test_only_the_logits_are_kept_for_the_gradient():
  logits = normal(0, 4, 4, 100)
  _, pullback = jax.vjp(lambda x: sinkhorn(x, iterations=20), logits)
  kept = sum(leaf.size for leaf in jax.tree.leaves(pullback))
  assert kept <= logits.size


# --- the start, and the dtypes ---


def test_without_scale_it_is_a_plain_residual_block():
  connections = module()
  connections.scale[...] = jnp.zeros(3)
  x = normal(0, 2, 5, 6)
  streams = jnp.repeat(x[:, :, None], 4, axis=2)
  mixed = connections(streams)
  np.testing.assert_allclose(mixed.pre, 1 / 4, rtol=1e-6)
  np.testing.assert_array_equal(mixed.post, 1)
  identity = jnp.eye(4)[:, :, None, None]
  assert abs(mixed.residual - identity).max() < 2e-3
  found = read(streams, mixed.pre)
  np.testing.assert_allclose(found, x, rtol=1e-6)
  written = write(streams, sublayer(found), mixed.post, mixed.residual)
  plain = (x + sublayer(x))[:, :, None]
  np.testing.assert_allclose(
    written, jnp.broadcast_to(plain, written.shape), rtol=2e-6, atol=1e-6
  )


def test_new_parameters():
  connections = module(g=4, d=64)
  params = nnx.to_pure_dict(nnx.state(connections))
  shapes = {name: x.shape for name, x in params.items()}
  assert shapes == {"kernel": (256, 24), "scale": (3,), "bias": (24,)}
  assert {x.dtype for x in params.values()} == {jnp.dtype("float32")}
  np.testing.assert_array_equal(params["scale"], np.float32(0.01))
  assert abs(float(params["kernel"].std()) - 0.02) < 1e-3
  # Close to a plain residual block with its scale too, but no two tokens, and
  # no two streams, alike.
  streams = jnp.repeat(normal(0, 2, 5, 1, 64), 4, axis=2)
  mixed = connections(streams)
  assert 0 < abs(mixed.pre - 0.25).max() < 0.01
  assert 0 < abs(mixed.post - 1).max() < 0.02
  assert mixed.pre.std(axis=0).min() > 0 and mixed.post.std(axis=0).min() > 0


def test_bfloat16_streams_are_mixed_in_float32():
  given = arguments()
  half = given["streams"].astype(jnp.bfloat16)
  full = half.astype(jnp.float32)
  update = normal(5, 2, 3, 6).astype(jnp.bfloat16)
  mixed, exact = (
    mixing(**{**given, "streams": x}, **OPTIONS) for x in (half, full)
  )
  assert {x.dtype for x in mixed} == {jnp.dtype("float32")}
  for a, b in zip(mixed, exact):
    np.testing.assert_array_equal(a, b)
  found = read(half, mixed.pre), write(half, update, mixed.post, mixed.residual)
  expected = (
    read(full, mixed.pre),
    write(full, update.astype(jnp.float32), mixed.post, mixed.residual),
  )
  for a, b in zip(found, expected):
    assert a.dtype == jnp.bfloat16
    np.testing.assert_array_equal(a, b.astype(jnp.bfloat16))


# --- bad input ---


@pytest.mark.parametrize("field", ["kernel", "scale", "bias"])
def test_mixing_refuses_parameters_of_other_streams(field):
  given = arguments()
  given[field] = given[field][:-1]
  with pytest.raises(InputError, match=f"^{field}.shape: .*; valid: "):
    mixing(**given, **OPTIONS)


def test_refuses_other_bad_input():
  given = arguments()
  streams = given["streams"]
  pre, post, residual = mixing(**given, **OPTIONS)
  with pytest.raises(InputError, match=r"^pre.shape: .*valid: \(4, 2, 3\)"):
    read(streams, pre[:1])
  update = streams[:, :, 0]
  with pytest.raises(InputError, match=r"^update.shape: .*\(2, 3, 6\)"):
    write(streams, update[..., :1], post, residual)
  with pytest.raises(InputError, match=r"^post.shape: .*\(4, 2, 3\)"):
    write(streams, update, post[:1], residual)
  with pytest.raises(InputError, match=r"^residual.shape: .*\(4, 4, 2, 3\)"):
    write(streams, update, post, residual[:, :1])
  with pytest.raises(InputError, match=r"^logits.shape: .*\[G, G, ...\]"):
    sinkhorn(residual[:1], iterations=20)
  with pytest.raises(InputError, match=r"^iterations: 0; valid: >= 1"):
    sinkhorn(residual, iterations=0)
  with pytest.raises(InputError, match=r"^streams: 1; valid: >= 2"):
    module(g=1)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e30])
def test_mixing_of_streams_of_any_size(size):
  streams = size * jax.random.normal(jax.random.key(0), (1, 2, 2, 4))
  kernel = 0.1 * jax.random.normal(jax.random.key(1), (8, 8))

  def loss(streams, kernel):
    found = mixing(
      streams,
      kernel,
      jnp.full(3, 0.5),
      jnp.zeros(8),
      eps=1e-6,
      iterations=5,
    )
    return sum(jnp.sum(part**2) for part in found), found

  find = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
  slopes, found = find(streams, kernel)
  for array in (*slopes, *found):
    assert jnp.isfinite(array).all()
  if size == 1e30:
    # The norm takes the size out.
    _, ordinary = find(streams / 1e30, kernel)
    for array, other in zip(found, ordinary):
      np.testing.assert_allclose(array, other, rtol=1e-4)


@pytest.mark.parametrize("size", [0.0, 100.0, 1e30, 3e38])
def test_sinkhorn_of_logits_of_any_size(size):
  patterns = np.array(
    [[[1, 1], [-1, -1]], [[1, -1], [-1, 1]], [[0, 1], [1, 1]]]
  )
  logits = jnp.asarray(np.moveaxis(patterns, 0, -1) * size, jnp.float32)

  def loss(logits):
    matrix = sinkhorn(logits, iterations=20)
    return jnp.sum(matrix**3), matrix

  slope, matrix = jax.grad(loss, has_aux=True)(logits)
  np.testing.assert_allclose(matrix.sum(1), 1, rtol=1e-5)
  assert jnp.isfinite(slope).all()
