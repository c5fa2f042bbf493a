"""Tests of the unbiased CKA against its definitions, and of the alignment."""

import itertools
import math

import numpy as np
import pytest

from engram_jax.analysis.cka import (
  centered_kernel,
  cka,
  hsic_sums,
  soft_alignment,
  unbiased_hsic,
)
from engram_jax.errors import InputError

RNG = np.random.default_rng(0)


def draw(*shape):
  return RNG.normal(size=shape)


def one(x, y, batch=64):
  """CKA of two representations, in minibatches."""
  parts = range(0, len(x), batch)
  pairs = ((x[None, i : i + batch], y[None, i : i + batch]) for i in parts)
  return float(cka(hsic_sums(pairs))[0, 0])


def test_hsic_is_the_mean_over_four_different_tokens():
  """Song et al. 2012: the U-statistic, term by term."""
  n, x, y = 7, draw(7, 3) + 2, draw(7, 5)
  k, m = x @ x.T, y @ y.T
  total = sum(
    k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q])
    for i, j, q, r in itertools.permutations(range(n), 4)
  )
  expected = total / (math.factorial(n) / math.factorial(n - 4))
  np.testing.assert_allclose(unbiased_hsic(x, y), expected, rtol=1e-10)


def test_hsic_is_the_closed_form():
  """Eq. 3 of Nguyen et al., which the paper cites."""
  n, x, y = 12, draw(12, 4), draw(12, 6) + 1
  k, m = x @ x.T, y @ y.T
  np.fill_diagonal(k, 0)
  np.fill_diagonal(m, 0)
  ones = np.ones(n)
  expected = np.trace(k @ m)
  expected += (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
  expected -= 2 / (n - 2) * (ones @ k @ m @ ones)
  expected /= n * (n - 3)
  np.testing.assert_allclose(unbiased_hsic(x, y), expected, rtol=1e-10)
  for kernel in (centered_kernel(x), centered_kernel(x + 1e4)):
    np.testing.assert_allclose(kernel.sum(axis=0), 0, atol=1e-6)


def test_it_has_no_bias():
  """Independent, and more dimensions than tokens: the plain one is near 1."""
  values = [one(draw(512, 50), draw(512, 50), batch=16) for _ in range(8)]
  assert abs(np.mean(values)) < 0.05
  x, y = (side - side.mean(axis=0) for side in (draw(16, 50), draw(16, 50)))
  k, m = x @ x.T, y @ y.T
  plain = np.sum(k * m) / np.sqrt(np.sum(k * k) * np.sum(m * m))
  assert plain > 0.5


def test_equal_up_to_rotation_scale_and_shift_is_one():
  x = draw(128, 6)
  rotation, _ = np.linalg.qr(draw(6, 6))
  np.testing.assert_allclose(one(x, x), 1, rtol=1e-12)
  np.testing.assert_allclose(one(x, 3 * x @ rotation + 5), 1, rtol=1e-9)
  # Not up to any linear map: that would make all wide layers alike.
  assert one(x, x @ np.diag([9.0, 1, 1, 1, 1, 1])) < 0.9
  mixed = one(x, x + draw(128, 6))
  assert 0.2 < mixed < 0.8


def test_all_pairs_of_layers_over_batches_of_any_size():
  xs, ys = draw(2, 50, 3), draw(3, 50, 4)
  ys[1, :, :3] += xs[0]
  cuts = [(0, 20), (20, 36), (36, 50)]
  sums = hsic_sums((xs[:, a:b], ys[:, a:b]) for a, b in cuts)
  found = cka(sums)
  assert found.shape == (2, 3)

  def total(u, v):
    return sum(unbiased_hsic(u[a:b], v[a:b]) for a, b in cuts)

  for i, j in itertools.product(range(2), range(3)):
    own = total(xs[i], xs[i]) * total(ys[j], ys[j])
    expected = total(xs[i], ys[j]) / math.sqrt(own)
    np.testing.assert_allclose(found[i, j], expected, rtol=1e-10)


def test_soft_alignment_is_a_weighted_mean_of_the_closest_layers():
  s = np.array([[0.1, 0.8], [0.6, 0.4], [0.3, 0.2], [0.2, 0.1]])
  expected = [
    (0.6 * 2 + 0.3 * 3) / 0.9,
    (0.8 * 1 + 0.4 * 2) / 1.2,
  ]
  np.testing.assert_allclose(soft_alignment(s, k=2), expected)
  np.testing.assert_allclose(
    soft_alignment(s, k=2, first=0), np.array(expected) - 1
  )
  everything = (s * np.arange(1, 5)[:, None]).sum(0) / s.sum(0)
  np.testing.assert_allclose(soft_alignment(s, k=9), everything)
  assert soft_alignment(np.eye(6) + 1e-9, k=1).tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.usefixtures("types_unchecked")
def test_refusals():
  x = draw(6, 3)
  with pytest.raises(InputError, match=r"^x: 3 tokens; valid: 4 or more"):
    unbiased_hsic(x[:3], x[:3])
  with pytest.raises(InputError, match=r"^y: 5 tokens; valid: the 6 of x"):
    unbiased_hsic(x, x[:5])
  with pytest.raises(InputError, match=r"^batches: none; valid: one or more"):
    hsic_sums([])
  same = np.ones((1, 6, 3))
  with pytest.raises(InputError, match=r"^sums.own_y: 0.0; valid: above 0"):
    cka(hsic_sums([(x[None], same)]))
  with pytest.raises(InputError, match=r"^k: 0; valid: an integer >= 1"):
    soft_alignment(np.eye(2), k=0)
  with pytest.raises(InputError, match=r"^similarity: -0.5; valid: above 0"):
    soft_alignment(np.array([[1.0], [-0.5]]))
