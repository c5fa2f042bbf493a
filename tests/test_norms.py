"""Normalisation at the ends of the range: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.norms import rms_norm

SIZES = (0.0, 1e-36, 1e-30, 1e-10, 1.0, 1e10, 1e16, 1e30, 3e38)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("eps", [1e-6, 1e-20])
def test_rms_norm_equals_float64_for_every_size(size, eps, dtype):
  ordinary = np.array([[0.5, -1.0, 0.25, 1.0], [1.0, 0.0, 0.0, -0.5]])
  x = jnp.asarray(size * ordinary, dtype)
  exact = np.asarray(x, np.float64)
  square = (exact**2).mean(-1, keepdims=True) + eps
  expected = exact / np.sqrt(square)
  weights = np.array([0.3, -0.7, 1.1, 0.2])

  def loss(x):
    y = rms_norm(x, eps=eps)
    return jnp.sum(y * jnp.asarray(weights, jnp.float32)), y

  slope, y = jax.jit(jax.grad(loss, has_aux=True))(x)
  np.testing.assert_allclose(y, expected, rtol=2e-6, atol=1e-30)
  mean = (weights * exact).mean(-1, keepdims=True)
  slopes = (weights - exact * mean / square) / np.sqrt(square)
  assert jnp.isfinite(slope).all()
  # Rounded to the dtype; differences of products lose some digits, and slopes
  # below the smallest normal number are 0.
  np.testing.assert_allclose(
    np.asarray(slope, np.float64),
    slopes,
    rtol=2e-5 if dtype == "float32" else 1e-2,
    atol=2e-6 * np.abs(slopes).max() + 2e-38,
  )


def test_rms_norm_of_one_huge_row_leaves_the_others_to_the_bit():
  x = jax.random.normal(jax.random.key(0), (4, 64))
  mixed = x.at[1].multiply(1e30)
  norm = jax.jit(lambda x: rms_norm(x, eps=1e-6))
  rows = np.array([0, 2, 3])
  np.testing.assert_array_equal(norm(mixed)[rows], norm(x)[rows])
  np.testing.assert_allclose(norm(mixed)[1], norm(x)[1], rtol=1e-5)
