"""Means with their intervals, and what a study is able to see."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats

from engram_jax.errors import require

CONFIDENCE = 0.95


def mean_interval(values: Sequence[float]) -> dict[str, Any]:
  """The mean over seeds, with Student's interval.

  Args:
    values: one number per seed.

  Returns:
    `mean`, `low`, `high` (95 %), `sd` and `n`; of one value the interval and
    the deviation are None.

  Raises:
    InputError: no values.
  """
  require(len(values) > 0, "values", "none", "one or more")
  array = np.asarray(values, float)
  found = {"mean": float(array.mean()), "n": len(array)}
  if len(array) == 1:
    return {**found, "low": None, "high": None, "sd": None}
  sd = float(array.std(ddof=1))
  t = stats.t.ppf((1 + CONFIDENCE) / 2, len(array) - 1)
  half = float(t * sd / np.sqrt(len(array)))
  mean = found["mean"]
  return {**found, "low": mean - half, "high": mean + half, "sd": sd}


def paired_difference(
  ours: Sequence[float], theirs: Sequence[float]
) -> dict[str, Any]:
  """`ours - theirs` seed by seed: the seeds' text is the same on both sides.

  Args:
    ours: one number per seed.
    theirs: the same seeds, in the same order.

  Returns:
    As `mean_interval`, of the differences.

  Raises:
    InputError: other numbers of seeds.
  """
  found, valid = f"{len(ours)} and {len(theirs)}", "as many on both sides"
  require(len(ours) == len(theirs), "seeds", found, valid)
  return mean_interval(np.asarray(ours, float) - np.asarray(theirs, float))


def pooled_sd(groups: Sequence[Sequence[float]]) -> dict[str, float]:
  """The deviation between seeds, from groups of a few runs each.

  Args:
    groups: values per group, two or more in each.

  Returns:
    `sd`, its degrees of freedom `df`, and `upper`, which the true deviation
    exceeds in one of ten such pilots.
  """
  arrays = [np.asarray(group, float) for group in groups]
  df = sum(len(array) - 1 for array in arrays)
  require(df > 0, "groups", groups, "one or more of two values")
  squares = sum(float(((x - x.mean()) ** 2).sum()) for x in arrays)
  return {
    "sd": float(np.sqrt(squares / df)),
    "upper": float(np.sqrt(squares / stats.chi2.ppf(0.1, df))),
    "df": df,
  }


def detectable_difference(
  sd: float, seeds: int, *, power: float = 0.8, alpha: float = 0.05
) -> float:
  """The smallest true difference of two groups that a study would find.

  Args:
    sd: deviation of one side's loss between seeds.
    seeds: seeds of each side.
    power: chance to find it.
    alpha: chance of finding one where there is none.

  Returns:
    In the unit of `sd`; a two-sided t-test of two independent groups.
  """
  df = 2 * seeds - 2
  require(df > 0, "seeds", seeds, "two or more")
  critical = stats.t.ppf(1 - alpha / 2, df)

  def chance(effect: float) -> float:
    return float(stats.nct.sf(critical, df, effect * np.sqrt(seeds / 2)))

  low, high = 0.0, 1.0
  while chance(high) < power:
    high *= 2
  for _ in range(60):
    middle = (low + high) / 2
    low, high = (low, middle) if chance(middle) > power else (middle, high)
  return high * sd


def bootstrap(
  groups: Sequence[Sequence[float]],
  statistic: Callable[[np.ndarray], float],
  *,
  samples: int = 2000,
  seed: int = 0,
) -> dict[str, float]:
  """A statistic of group means, and its interval over seeds drawn anew.

  Args:
    groups: values per seed of each group, in the order of the statistic.
    statistic: function of the means [groups].
    samples: number of draws.
    seed: seed of the draws.

  Returns:
    `value`, `low` and `high` (95 %, percentiles).
  """
  arrays = [np.asarray(group, float) for group in groups]
  value = statistic(np.array([x.mean() for x in arrays]))
  generator = np.random.default_rng(seed)
  drawn = [
    statistic(np.array([generator.choice(x, len(x)).mean() for x in arrays]))
    for _ in range(samples)
  ]
  low, high = np.percentile(drawn, [2.5, 97.5])
  return {"value": float(value), "low": float(low), "high": float(high)}


def parabola_minimum(
  x: Sequence[float], means: np.ndarray
) -> tuple[float, np.ndarray]:
  """Where a parabola through points is least, within their range.

  Args:
    x: places [n], three or more.
    means: values [n].

  Returns:
    The place (an end of the range where the parabola has no minimum inside),
    and its coefficients, highest power first.
  """
  x = np.asarray(x, float)
  a, b, c = coefficients = np.polyfit(x, means, 2)
  if a <= 0:
    ends = np.polyval(coefficients, [x.min(), x.max()])
    return float((x.min(), x.max())[int(np.argmin(ends))]), coefficients
  del c
  return float(np.clip(-b / (2 * a), x.min(), x.max())), coefficients
