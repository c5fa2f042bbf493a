"""The gate: its formula, its root, its range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.fusion.gating import (
  gate_scores,
  gate_values,
  signed_square_root,
)


def test_scores_against_numpy():
  rng = np.random.default_rng(0)
  hidden, keys = rng.normal(size=(2, 2, 3, 4, 8)).astype(np.float32)
  query_scale, key_scale = rng.normal(size=(2, 4, 8)).astype(np.float32)

  def normed(x, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)

  products = normed(hidden, 0.5) * query_scale * normed(keys, 0.1) * key_scale
  found = gate_scores(
    *map(jnp.asarray, (hidden, keys, query_scale, key_scale)),
    query_eps=0.5,
    key_eps=0.1,
  )
  np.testing.assert_allclose(found, products.sum(-1) / 8**0.5, rtol=2e-5)


@pytest.mark.parametrize(
  "score, with_root, without",
  [(4.0, 0.881, 0.982), (0.25, 0.622, 0.562), (0.0, 0.5, 0.5)],
)
def test_published_gate_values(score, with_root, without):
  scores = jnp.full((1, 1, 1), score)
  assert abs(float(gate_values(scores)[0, 0, 0]) - with_root) < 5e-4
  plain = gate_values(scores, signed_sqrt=False)
  assert abs(float(plain[0, 0, 0]) - without) < 5e-4


def test_signed_root_is_odd_and_has_a_finite_slope():
  scores = jnp.array([-4.0, -1e-9, 0.0, 1e-9, 4.0])[:, None, None]
  roots = signed_square_root(scores)[:, 0, 0]
  np.testing.assert_allclose(roots, [-2, -1e-3, 0, 1e-3, 2], rtol=1e-6)
  slope = jax.grad(lambda s: signed_square_root(s).sum())(scores)
  assert jnp.isfinite(slope).all()


@pytest.mark.parametrize("score", [0.0, 1e-38, 1e-6, 1.0, 1e30, 3e38])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("signed_sqrt", [True, False])
def test_gates_and_their_slope_are_finite_for_every_score(
  score, sign, signed_sqrt
):
  gate = lambda s: jnp.sum(gate_values(s, signed_sqrt=signed_sqrt))
  scores = jnp.full((1, 1, 1), sign * score)
  value, slope = jax.value_and_grad(gate)(scores)
  assert 0 <= value <= 1 and jnp.isfinite(slope)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_scores_of_hidden_states_and_keys_of_any_size(size, dtype):
  hidden = jnp.asarray(size * np.array([[[[1.0, -2, 3, 4]]]]), dtype)
  ones = jnp.ones((1, 4))

  def score(hidden, keys):
    found = gate_scores(hidden, keys, ones, ones, query_eps=1e-6, key_eps=1e-6)
    return jnp.sum(gate_values(found)), found

  slopes, found = jax.grad(score, argnums=(0, 1), has_aux=True)(hidden, hidden)
  # Agreement of a vector with itself: sqrt(D), or 0 where nothing is.
  expected = 2.0 if size == 1e30 else 0.0
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
  for slope in slopes:
    assert jnp.isfinite(slope).all()
