"""YaRN (arXiv 2309.00071): rotary positions of a model stretched s times.

  theta_i <- theta_i * (1 - ramp_i * (1 - 1/s))     ramp_i in 0..1
  softmax's scale <- m^2 / sqrt(Q),   m = 0.1 f ln(s) + 1

A pair that turns often over the length of training tells near positions apart
and keeps its frequency (ramp 0); one that makes no full turn is interpolated
(ramp 1), so that it meets no angle it was not trained on. Axes besides those of
`types.py`:

  P  rotary width, even; pair i of its P / 2 turns theta_i a position
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from engram_jax.backbone.layers import rotary_frequencies
from engram_jax.config import YarnConfig
from engram_jax.errors import require


def _pair_that_turns(turns: float, dim: int, theta: float, length: int):
  """The pair, between two whole numbers, that turns `turns` times in all."""
  return dim * math.log(length / (2 * math.pi * turns)) / (2 * math.log(theta))


def yarn_frequencies(
  dim: int, theta: float, config: YarnConfig | None
) -> Float[Array, "half"]:
  """Angle per position of each rotary pair, as DeepSeek's models stretch it.

  The ramp is linear in the pair's index, between the pair of `fast_turns`
  rounded down and the pair of `slow_turns` rounded up, both clipped to
  0..P - 1: so DeepSeek's code, for V2 and since. The paper's formula is linear
  in the number of turns instead. The two agree beyond the bounds, but for a
  pair that the rounding takes in, and differ between them.

  Args:
    dim: P, rotary width, even.
    theta: base of the frequencies, above 1 where it is stretched.
    config: None leaves the frequencies as they are.

  Returns:
    float32 `[P / 2]`, radians per position.

  Raises:
    InputError: `dim` is odd, or `theta` is not above 1.
  """
  frequencies = rotary_frequencies(dim, theta)
  if config is None:
    return frequencies
  # With a base of 1 or less no pair is slower than the first.
  require(theta > 1, "rope_theta", theta, "above 1 with yarn")
  length = config.original_length
  fast = _pair_that_turns(config.fast_turns, dim, theta, length)
  slow = _pair_that_turns(config.slow_turns, dim, theta, length)
  low = min(max(math.floor(fast), 0), dim - 1)
  high = min(max(math.ceil(slow), 0), dim - 1)
  # DeepSeek's width of a ramp whose ends coincide.
  width = (high - low) or 0.001
  ramp = np.clip((np.arange(dim // 2) - low) / width, 0, 1)
  kept = 1 - ramp * (1 - 1 / config.scale)
  return frequencies * jnp.asarray(kept, jnp.float32)


def yarn_softmax_factor(config: YarnConfig | None) -> float:
  """m^2, by which the scale of the attention's scores is multiplied.

  It sharpens the softmax, which would flatten over more keys. 1 for None, and
  where nothing is stretched (s = 1).
  """
  if config is None:
    return 1.0
  return (0.1 * config.temperature * math.log(config.scale) + 1) ** 2
