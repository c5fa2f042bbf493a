"""Tests of the learning rate by step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.run_config import TrainConfig
from engram_jax.training.schedules import warmup_step_decay

PEAK = 4e-4


def config(**changes) -> TrainConfig:
  options = {"steps": 10_000, "batch_size": 4, "seq_len": 8}
  return TrainConfig(**options | {"learning_rate": PEAK} | changes)


def rates(at, **changes) -> list[float]:
  schedule = warmup_step_decay(config(**changes))
  return [float(schedule(jnp.int32(step))) for step in at]


def test_the_paper_s_schedule():
  # 2,000 steps of warm-up, then steps down at 80 % and 90 % of 10,000.
  by_step = {
    0: 1 / 2000,
    1: 2 / 2000,
    999: 1000 / 2000,
    1999: 1.0,
    2000: 1.0,
    7999: 1.0,
    8000: 0.316,
    8999: 0.316,
    9000: 0.1,
    9999: 0.1,
  }
  expected = [PEAK * share for share in by_step.values()]
  np.testing.assert_allclose(rates(by_step), expected, rtol=1e-5)


def test_warm_up_rises_by_equal_amounts():
  found = rates(range(6), warmup_steps=4)
  expected = [PEAK * share for share in (0.25, 0.5, 0.75, 1, 1, 1)]
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  for warmup in (0, 1):
    np.testing.assert_allclose(rates([0, 1], warmup_steps=warmup), PEAK)


def test_a_run_shorter_than_its_warm_up():
  # Both apply: the ramp goes on, and the steps down multiply it.
  found = rates([0, 7, 8, 9], steps=10, warmup_steps=20)
  expected = [PEAK * s for s in (1 / 20, 8 / 20, 0.316 * 9 / 20, 0.1 * 10 / 20)]
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_points_of_the_config():
  found = rates(
    [49, 50, 74, 75],
    steps=100,
    warmup_steps=0,
    decay_points=(0.5, 0.75),
    decay_factors=(0.5, 0.2),
  )
  np.testing.assert_allclose(
    found, [PEAK, 0.5 * PEAK, 0.5 * PEAK, 0.2 * PEAK], rtol=1e-5
  )
  constant = rates(
    [0, 99], steps=100, warmup_steps=0, decay_points=(), decay_factors=()
  )
  np.testing.assert_allclose(constant, PEAK)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_points_that_fall_on_one_step(steps):
  # The last factor holds, however many points a short run rounds together.
  options = {
    "steps": steps,
    "warmup_steps": 0,
    "decay_points": (0.6, 0.61, 0.62),
    "decay_factors": (0.5, 0.4, 0.2),
  }
  found = rates([round(0.6 * steps)], **options)
  np.testing.assert_allclose(found, 0.2 * PEAK, rtol=1e-5)


def test_it_is_traced_like_any_function_of_the_step():
  schedule = warmup_step_decay(config(warmup_steps=10))
  steps = jnp.arange(12)
  found = jax.jit(jax.vmap(schedule))(steps)
  assert found.dtype == jnp.float32
  expected = [float(schedule(step)) for step in steps]
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_rate_is_a_multiple_of_the_peak():
  steps = [0, 5, 900]
  once = rates(steps, steps=1000, warmup_steps=10)
  base = config(steps=1000, warmup_steps=10)
  double = warmup_step_decay(dataclasses.replace(base, learning_rate=2 * PEAK))
  np.testing.assert_allclose(
    [float(double(s)) for s in steps], 2 * np.array(once), rtol=1e-5
  )


@pytest.mark.parametrize("peak", [1e-30, 1e-20, 3e-4, 1e20, 1e30])
def test_a_peak_of_any_size_is_reached(peak):
  config = TrainConfig(
    steps=100, batch_size=1, seq_len=1, learning_rate=peak, warmup_steps=4
  )
  rate = warmup_step_decay(config)
  found = [float(rate(step)) for step in (0, 3, 50, 85, 95)]
  expected = np.array([0.25, 1, 1, 0.316, 0.1]) * peak
  np.testing.assert_allclose(found, expected, rtol=1e-5)
