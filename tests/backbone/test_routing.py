"""Routing at the ends of the range: weights, balance and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.backbone import routing
from engram_jax.backbone.moe import MoE
from engram_jax.config import MoEConfig

FORMS = ("dense", "bucketed", "dropless")
LOGITS = (-3e38, -1e30, -1e5, -104.0, -88.0, -70.0, 0.0, 88.0, 1e30)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("logit", LOGITS)
def test_weights_and_gradients_are_finite_for_every_logit(logit, dtype):
  x = jnp.ones((2, 4), dtype)
  router = jnp.full((4, 8), logit / 4)
  # Small differences: equal logits would hide a lost one.
  if abs(logit) < 1e6:
    router = router - 0.1 * jnp.arange(8)

  def loss(x, router):
    ids, weights, affinities = routing.route(x, router, jnp.zeros(8), top_k=2)
    balance = routing.balance_loss(affinities[None], ids[None], weight=1.0)
    return jnp.sum(weights[:, 0] ** 2) + balance, (ids, weights, balance)

  find = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
  (_, (ids, weights, balance)), slopes = find(x, router)
  np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
  assert jnp.isfinite(balance) and jnp.isfinite(weights).all()
  for slope in slopes:
    assert jnp.isfinite(slope).all()
  # The weights are those of float64.
  chosen = np.asarray(x, np.float64) @ np.asarray(router, np.float64)
  chosen = np.take_along_axis(chosen, np.asarray(ids), axis=1)
  logs = -np.logaddexp(0, -chosen)
  logs -= logs.max(-1, keepdims=True)
  expected = np.exp(logs) / np.exp(logs).sum(-1, keepdims=True)
  np.testing.assert_allclose(weights, expected, rtol=1e-3, atol=1e-6)


def test_where_affinities_underflow_the_gradient_is_that_of_a_softmax():
  x = jnp.ones((1, 1))
  router = jnp.array([[-200.0, -201.0, -300.0]])

  def first(router):
    return routing.route(x, router, jnp.zeros(3), top_k=2)[1][0, 0]

  share = 1 / (1 + np.exp(-1.0))
  np.testing.assert_allclose(first(router), share, rtol=1e-5)
  np.testing.assert_allclose(
    jax.grad(first)(router)[0],
    [share * (1 - share), -share * (1 - share), 0],
    rtol=1e-4,
  )


def test_the_bias_may_choose_experts_that_nothing_suits():
  x = jnp.ones((2, 4))
  router = jnp.concatenate(
    [jnp.full((4, 3), -40.0), jnp.full((4, 3), 0.1)], axis=1
  )
  bias = jnp.array([5.0, 5, 5, 0, 0, 0])
  ids, weights, affinities = routing.route(x, router, bias, top_k=2)
  assert np.asarray(ids).max() < 3
  np.testing.assert_allclose(weights, 0.5)
  loss = lambda a: routing.balance_loss(a[None], ids[None], weight=1.0)
  assert jnp.isfinite(jax.grad(loss)(affinities)).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [22.0, 1e3])
def test_every_dispatch_of_a_hopeless_token_is_finite(form, size):
  config = MoEConfig(
    num_experts=8, top_k=2, expert_size=4, capacity_factor=100.0
  )

  layer = MoE(4, config, init_std=0.5, dtype="float32", rngs=nnx.Rngs(0))
  layer.router[...] = jnp.full((4, 8), -size)

  @nnx.jit
  def find(layer, x):
    def loss(layer, x):
      y, metrics = layer(x, dispatch=form)
      return jnp.sum(y**2) + metrics.balance_loss

    return nnx.value_and_grad(loss, argnums=(0, 1))(layer, x)

  found = find(layer, jnp.ones((1, 2, 4)))
  for leaf in jax.tree.leaves(found):
    assert jnp.isfinite(leaf).all()


@pytest.mark.parametrize("affinity", [0.0, 1e-38, 1e-20, 0.5, 1.0])
def test_balance_of_equal_affinities_is_balanced_whatever_their_size(affinity):
  affinities = jnp.full((1, 4, 4), affinity)
  ids = jnp.arange(4).reshape(1, 4, 1)
  loss = lambda a: routing.balance_loss(a, ids, weight=0.5)
  np.testing.assert_allclose(loss(affinities), 0.5, rtol=1e-6)
  assert jnp.isfinite(jax.grad(loss)(affinities)).all()


def test_no_load_violates_no_balance():
  load = jnp.array([[0.0, 0, 0], [2, 0, 1]])
  np.testing.assert_allclose(routing.max_violation(load), [0, 1])
