"""N-grams of a text numbered exactly, on the host: for counts, not for lookups.

Where a hash gives a row that n-grams share, a number here belongs to one n-gram
alone.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


def number_tuples(
  columns: Sequence[Int[np.ndarray, "n"]],
) -> Int[np.ndarray, "n"]:
  """Numbers 0, 1, ... that are equal where all columns are equal.

  Args:
    columns: one or more of integers >= 0, n times the largest below 2**63.
  """
  numbers = np.zeros(len(columns[0]), np.int64)
  for column in columns:
    # Renumbered at each column, so that a key of two always fits.
    key = numbers * (int(column.max(initial=0)) + 1) + column
    numbers = np.unique(key, return_inverse=True)[1]
  return numbers
