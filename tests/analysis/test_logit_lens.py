"""Tests of the LogitLens divergences."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from engram_jax.analysis.hidden_states import hidden_states
from engram_jax.analysis.logit_lens import kl_divergence, lens_divergences


def test_divergence_is_its_sum():
  p, q = np.array([0.5, 0.25, 0.25]), np.array([0.1, 0.6, 0.3])
  expected = sum(a * np.log(a / b) for a, b in zip(p, q))
  found = kl_divergence(jnp.log(p), jnp.log(q))
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  # It is no distance: the order of the two matters.
  assert abs(kl_divergence(jnp.log(q), jnp.log(p)) - expected) > 0.01


def test_each_depth_against_the_output(probed):
  inputs = probed.batch["inputs"]

  @nnx.jit
  def lens(model):
    states = hidden_states(model, None, inputs)
    return (
      states,
      lens_divergences(model, states),
      model(inputs, None, dispatch="dense").logits,
    )

  states, found, logits = lens(probed.model)
  assert found.shape == (4, *inputs.shape) and found.dtype == jnp.float32
  np.testing.assert_allclose(found[-1], 0, atol=1e-6)
  table = np.asarray(probed.model.output_matrix(), np.float64)
  scale = np.asarray(probed.model.norm.scale[...], np.float64)

  def chances(z):
    z = np.exp(np.asarray(z, np.float64) - z.max())
    return z / z.sum()

  for depth, b, t in ((0, 0, 0), (1, 1, 5), (2, 0, 8)):
    x = np.asarray(states[depth, b, t], np.float64)
    x = x / np.sqrt(np.mean(x * x) + probed.model.config.norm_eps) * scale
    p, q = chances(table @ x), chances(logits[b, t])
    expected = np.sum(p * np.log(p / q))
    np.testing.assert_allclose(found[depth, b, t], expected, rtol=1e-3)
    assert expected > 0.001
