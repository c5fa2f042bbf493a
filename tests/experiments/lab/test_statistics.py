"""Intervals and power, against values worked out by hand and by simulation."""

import numpy as np
import pytest
from scipy import stats

from engram_jax.errors import InputError
from experiments.lab.statistics import (
  bootstrap,
  detectable_difference,
  mean_interval,
  paired_difference,
  parabola_minimum,
  pooled_sd,
)


def test_mean_interval_is_students():
  found = mean_interval([1.0, 2.0, 3.0])
  half = 4.302653 / np.sqrt(3)  # t of 2 degrees of freedom, sd 1
  np.testing.assert_allclose(found["mean"], 2.0)
  np.testing.assert_allclose(found["high"] - 2.0, half, rtol=1e-6)
  np.testing.assert_allclose(2.0 - found["low"], half, rtol=1e-6)
  assert mean_interval([1.0]) == {
    "mean": 1.0, "n": 1, "low": None, "high": None, "sd": None,
  }  # fmt: skip
  with pytest.raises(InputError, match="values"):
    mean_interval([])


def test_pairs_take_out_what_the_seeds_share():
  seeds = np.array([0.0, 5.0, -3.0])
  found = paired_difference(seeds + np.array([1.0, 1.1, 0.9]), seeds)
  np.testing.assert_allclose(found["mean"], 1.0)
  assert found["low"] > 0.7
  with pytest.raises(InputError, match="seeds"):
    paired_difference([1.0], [1.0, 2.0])


def test_pooled_sd():
  found = pooled_sd([[0.0, 2.0], [10.0, 14.0]])
  np.testing.assert_allclose(found["sd"], np.sqrt((2 + 8) / 2))
  assert found["df"] == 2 and found["upper"] > found["sd"]


def test_detectable_difference_is_found_as_often_as_it_says():
  effect, rng = detectable_difference(1.0, 4), np.random.default_rng(0)
  ours = rng.normal(effect, 1.0, (4000, 4))
  theirs = rng.normal(0.0, 1.0, (4000, 4))
  p = stats.ttest_ind(ours, theirs, axis=1).pvalue
  assert abs((p < 0.05).mean() - 0.8) < 0.03
  assert detectable_difference(1.0, 16) < effect / 2
  np.testing.assert_allclose(detectable_difference(3.0, 4), 3 * effect)


def test_parabola_minimum():
  x = np.array([0.0, 0.2, 0.5, 0.9])
  place, coefficients = parabola_minimum(x, 2.0 + (x - 0.3) ** 2)
  np.testing.assert_allclose(place, 0.3)
  np.testing.assert_allclose(np.polyval(coefficients, 0.3), 2.0)
  assert parabola_minimum(x, -((x - 0.1) ** 2))[0] == 0.9  # no minimum inside
  assert parabola_minimum(x, x)[0] == pytest.approx(0.0)


def test_bootstrap_interval_holds_the_value():
  groups = [[1.0, 1.2, 0.9], [2.0, 2.1, 1.8]]
  found = bootstrap(groups, lambda means: means[1] - means[0])
  np.testing.assert_allclose(found["value"], np.mean([2, 2.1, 1.8]) - 3.1 / 3)
  assert found["low"] < found["value"] < found["high"]
