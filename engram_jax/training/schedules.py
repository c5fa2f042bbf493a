"""Learning-rate schedules: linear warm-up, constant, steps down (paper §4)."""

import math

import optax

from engram_jax.run_config import TrainConfig


def warmup_step_decay(config: TrainConfig) -> optax.Schedule:
  """Warm-up to the peak, then `decay_factors` of it from `decay_points` on.

  With the defaults this is the paper's: 2,000 steps of linear warm-up, times
  0.316 at 80 % and times 0.1 at 90 % of the steps.

  Returns:
    A function of the step, counted from 0. The first step has rate
    `learning_rate / warmup_steps`, not 0: no step is without effect.
  """
  peak, warmup = config.learning_rate, config.warmup_steps
  values, factor = {}, 1.0
  for point, share in zip(config.decay_points, config.decay_factors):
    step = round(point * config.steps)
    # In a short run two points may fall on one step: both count.
    values[step] = values.get(step, 1.0) * share / factor
    factor = share
  decay = optax.piecewise_constant_schedule(peak, values)
  if warmup == 0:
    return decay
  ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
  # `decay` counts from the run's start, so the two are multiplied.
  # A power of two near the peak, which changes no digit: the square of a peak
  # of 1e20, or of 1e-20, is no number of float32.
  unit = 2.0 ** math.floor(math.log2(peak))
  return lambda step: ramp(step) * (decay(step) / unit) / (peak / unit)
