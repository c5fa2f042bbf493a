"""Tables: their start, their reads, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.errors import InputError
from engram_jax.memory.table import init_table, lookup


def test_init_has_the_scale_asked_for():
  table = init_table(jax.random.key(0), 4001, 16, std=0.3)
  assert table.shape == (4001, 16) and table.dtype == jnp.float32
  assert abs(float(jnp.std(table)) - 0.3) < 0.01
  zeros = init_table(jax.random.key(0), 7, 2, std=0.0, dtype=jnp.bfloat16)
  assert zeros.dtype == jnp.bfloat16 and not zeros.any()


def test_lookup_is_indexing_and_its_gradient_a_scatter_add():
  table = init_table(jax.random.key(1), 50, 4, std=1.0)
  ids = jnp.array([[[3, 49], [3, 0]]])
  np.testing.assert_array_equal(lookup(table, ids), np.asarray(table)[ids])
  gradient = jax.grad(lambda t: jnp.sum(lookup(t, ids)))(table)
  expected = np.zeros((50, 4), np.float32)
  np.add.at(expected, np.asarray(ids), 1)
  np.testing.assert_array_equal(gradient, expected)


def test_refusals():
  key, table = jax.random.key(0), jnp.zeros((50, 4))
  with pytest.raises(InputError, match="num_rows: 0"):
    init_table(key, 0, 4, std=1.0)
  with pytest.raises(InputError, match="width: 0"):
    init_table(key, 4, 0, std=1.0)
  with pytest.raises(InputError, match="std: -1"):
    init_table(key, 4, 4, std=-1.0)
  for bad in (1e39, 1e-46, float("inf"), float("nan")):
    with pytest.raises(InputError, match=r"std: .*; valid: 0, or a number"):
      init_table(key, 4, 4, std=bad)
  for bad in (-1, 50):
    with pytest.raises(
      InputError, match=f"row_ids: {bad}; valid: 0 <= id < 50"
    ):
      lookup(table, jnp.array([0, bad]))
