"""Numbers of n-grams."""

import numpy as np

from engram_jax.memory import ngrams as lib


def test_numbers_of_large_columns_do_not_overflow():
  column = np.array([0, 2**31 - 2, 2**31 - 2, 5])
  found = lib.number_tuples([column] * 8)
  assert found[1] == found[2] and len(set(found.tolist())) == 3
