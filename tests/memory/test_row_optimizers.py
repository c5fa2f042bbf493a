"""Row-sparse Adam against the dense one, row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.errors import InputError
from engram_jax.memory.row_optimizers import (
  RowGradients,
  dense_adam,
  lazy_adam,
  squared_norm,
  sum_duplicates,
)

ROWS, WIDTH = 40, 3


def gradients(ids, seed=0) -> RowGradients:
  ids = jnp.asarray(ids, jnp.int32)
  values = jax.random.normal(jax.random.key(seed), (*ids.shape, WIDTH))
  return sum_duplicates(ids, values, num_rows=ROWS)


def table() -> jax.Array:
  return jax.random.normal(jax.random.key(9), (ROWS, WIDTH))


def run(optimizer, batches, learning_rate=0.1):
  """The table after each batch of ids."""
  current, state, history = table(), optimizer.init(table()), []
  update = jax.jit(optimizer.update, donate_argnums=(0, 1))
  for seed, ids in enumerate(batches):
    current, state = update(current, state, gradients(ids, seed), learning_rate)
    history.append(np.asarray(current).copy())
  return history, state


def test_sum_duplicates_is_the_dense_gradient():
  ids = jnp.array([[[7, 3, 7]], [[39, 7, 0]]])
  values = jax.random.normal(jax.random.key(0), (2, 1, 3, WIDTH))
  found = sum_duplicates(ids, values.astype(jnp.bfloat16), num_rows=ROWS)
  assert found.values.dtype == jnp.float32
  assert found.row_ids[:4].tolist() == [0, 3, 7, 39]
  # The rest is distinct padding beyond the table, with nothing in it.
  assert (found.row_ids[4:] >= ROWS).all()
  assert len(set(found.row_ids.tolist())) == 6
  assert not found.values[4:].any()
  dense = np.zeros((ROWS, WIDTH), np.float32)
  rounded = np.asarray(values.astype(jnp.bfloat16).astype(jnp.float32))
  np.add.at(dense, np.asarray(ids), rounded)
  np.testing.assert_allclose(found.values[:4], dense[[0, 3, 7, 39]], rtol=1e-6)
  np.testing.assert_allclose(squared_norm(found), (dense**2).sum(), rtol=1e-6)


@pytest.mark.parametrize("bias_correction", ["global", "row"])
def test_first_step_equals_dense_adam(bias_correction):
  ids = [[5, 5, 6, 39, 0, 5]]
  (lazy,), _ = run(lazy_adam(bias_correction=bias_correction), ids)
  (dense,), _ = run(dense_adam(), ids)
  np.testing.assert_allclose(lazy, dense, rtol=0, atol=3e-7)


@pytest.mark.parametrize("bias_correction", ["global", "row"])
def test_rows_touched_at_every_step_equal_dense_adam(bias_correction):
  always = [2, 30, 31]
  batches = [[*always, 2, 5 + i, 12 - i] for i in range(6)]
  lazy, _ = run(lazy_adam(bias_correction=bias_correction), batches)
  dense, _ = run(dense_adam(), batches)
  for a, b in zip(lazy, dense):
    np.testing.assert_allclose(a[always], b[always], rtol=0, atol=1e-6)
  # The difference elsewhere is real: dense Adam moves a row after its last
  # gradient, by momentum; the lazy one does not.
  assert abs(lazy[-1][5] - lazy[0][5]).max() == 0
  assert abs(dense[-1][5] - dense[0][5]).max() > 0.05


def test_untouched_rows_and_their_moments_keep_every_bit():
  optimizer = lazy_adam(bias_correction="row")
  batches = [[1, 2, 2], [2, 3, 3]]
  (_, after), state = run(optimizer, batches)
  touched = [1, 2, 3]
  others = np.setdiff1d(np.arange(ROWS), touched)
  np.testing.assert_array_equal(after[others], np.asarray(table())[others])
  assert not state.mean[others].any() and not state.variance[others].any()
  assert state.touches[jnp.array(touched)].tolist() == [1, 2, 1]
  assert int(state.step) == 2


def test_bias_correction_decides_the_first_step_of_a_late_row():
  batches = [[0]] * 200 + [[1]]
  for bias_correction, share in (("row", 1.0), ("global", 0.1 / 0.05**0.5)):
    history, _ = run(lazy_adam(bias_correction=bias_correction), batches)
    length = abs(history[-1][1] - history[-2][1])
    np.testing.assert_allclose(length, 0.1 * share, rtol=2e-3)


def test_bfloat16_table_keeps_float32_moments():
  optimizer = lazy_adam()
  half = table().astype(jnp.bfloat16)
  new, state = optimizer.update(
    half, optimizer.init(half), gradients([4, 4]), 0.1
  )
  assert new.dtype == jnp.bfloat16 and state.mean.dtype == jnp.float32
  assert (new[4] != half[4]).all() and (new[5] == half[5]).all()


def test_the_update_is_written_in_place():
  optimizer = lazy_adam()
  current, state = table(), optimizer.init(table())
  update = jax.jit(optimizer.update, donate_argnums=(0, 1))
  compiled = update.lower(current, state, gradients([1]), 0.1).compile()
  before = [x.unsafe_buffer_pointer() for x in (current, *state[1:3])]
  current, state = compiled(current, state, gradients([1]), 0.1)
  after = [x.unsafe_buffer_pointer() for x in (current, *state[1:3])]
  assert before == after


def test_refusals():
  with pytest.raises(InputError, match="bias_correction: rows"):
    lazy_adam(bias_correction="rows")
  with pytest.raises(InputError, match="num_rows: 2147483646"):
    sum_duplicates(
      jnp.zeros(4, jnp.int32), jnp.zeros((4, 1)), num_rows=2**31 - 2
    )
