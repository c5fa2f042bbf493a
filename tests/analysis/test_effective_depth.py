"""Tests of the two definitions of effective depth."""

import numpy as np
import pytest

from engram_jax.analysis.effective_depth import crossing_depth, mean_depth
from engram_jax.errors import InputError


def test_mean_depth_is_the_barycentre_of_the_fall():
  for d in ([3.0, 0, 0, 0], [3.0, 3, 3, 0], [3.0, 2, 1, 0], [2.0, 3, 1, 0]):
    falls = -np.diff(d)
    expected = np.sum(falls * np.arange(1, len(d))) / falls.sum()
    np.testing.assert_allclose(mean_depth(np.array(d)), expected)
  assert mean_depth(np.array([3.0, 0, 0, 0])) == 1
  assert mean_depth(np.array([3.0, 3, 3, 0])) == 3


def test_crossing_depth_is_where_the_curve_stays_below():
  d = np.array([4.0, 2, 1, 0])
  assert crossing_depth(d, level=3.0) == 0.5
  assert crossing_depth(d, level=2.0) == 1
  assert crossing_depth(d, level=0.25) == 2.75
  assert crossing_depth(d, level=5.0) == 0
  # Below, above, and below again: the last time counts.
  assert crossing_depth(np.array([4.0, 1, 3, 0]), level=1.5) == 2.5


def test_refusals():
  with pytest.raises(InputError, match=r"^divergences\[0\]: 0.0; valid: above"):
    mean_depth(np.zeros(3))
  with pytest.raises(InputError, match=r"^divergences\[-1\]: 1.0; valid: 0"):
    mean_depth(np.array([2.0, 1.0]))
  with pytest.raises(InputError, match=r"^level: 0.0; valid: above 0"):
    crossing_depth(np.array([2.0, 0.0]), level=0.0)
  with pytest.raises(InputError, match=r"^divergences\[-1\]: 1.0; valid: at m"):
    crossing_depth(np.array([2.0, 1.0]), level=0.5)
