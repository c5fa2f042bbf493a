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
