"""One number for how deep into a model its predictions are made.

Both are read off the lens divergences D_0 ... D_n of `logit_lens.py`, averaged
over tokens, and are in blocks. Depth 0 is before the first block.
"""

import numpy as np
from jaxtyping import Float

from engram_jax.errors import require


def mean_depth(divergences: Float[np.ndarray, "depths"]) -> float:
  """The depth at which the divergence falls, on average.

  The barycentre of the fall: block l counts with what it takes off,
  D_{l-1} - D_l, so that

    sum_l l (D_{l-1} - D_l) / D_0 = (D_0 + ... + D_{n-1}) / D_0

  A model that does all its work in the first block has 1, one that does it
  in the last has n. A block that adds to the divergence counts negatively.

  Args:
    divergences: D_0 to D_n, in nats; the last is 0.

  Raises:
    InputError: D_0 is not above 0, or D_n is not 0.
  """
  first, last = float(divergences[0]), float(divergences[-1])
  require(first > 0, "divergences[0]", first, "above 0")
  require(abs(last) < 1e-3 * first, "divergences[-1]", last, "0: the output's")
  return float(divergences[:-1].sum() / first)


def crossing_depth(
  divergences: Float[np.ndarray, "depths"], *, level: float
) -> float:
  """The depth from which the divergence stays at or below a level.

  Linear between depths. The level is in nats and the same for all models that
  are compared: unlike `mean_depth`, this does not depend on D_0.

  Args:
    divergences: D_0 to D_n, in nats.
    level: above 0.

  Raises:
    InputError: a level that is not above 0, or that D_n is above.
  """
  require(level > 0, "level", level, "above 0")
  last = float(divergences[-1])
  require(last <= level, "divergences[-1]", last, f"at most level = {level}")
  above = np.flatnonzero(divergences > level)
  if not len(above):
    return 0.0
  i = int(above[-1])
  high, low = divergences[i], divergences[i + 1]
  return float(i + (high - level) / (high - low))
