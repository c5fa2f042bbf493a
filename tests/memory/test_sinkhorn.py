"""The balanced update against a transcription in NumPy, and its dense form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.errors import InputError
from engram_jax.memory.row_sparse import RowGradients, sum_duplicates
from engram_jax.memory.sinkhorn import balance, dense_sinkhorn, sinkhorn

ROWS, WIDTH = 40, 6
RATE = 0.1
#: Steps of ids with duplicates; row 39 of the first has next to no gradient.
BATCHES = (
  [5, 5, 6, 39, 0, 5, 11, 12, 12],
  [6, 7, 6, 1, 2, 3, 39, 5, 5],
  [20, 21, 39, 22, 23, 5, 6, 6, 0],
)


def table() -> np.ndarray:
  return np.random.default_rng(9).normal(size=(ROWS, WIDTH)).astype(np.float32)


def values_of(ids, seed) -> np.ndarray:
  rng = np.random.default_rng(seed)
  values = rng.normal(size=(len(ids), WIDTH)).astype(np.float32)
  # Lengths over two orders of magnitude, as of frequent and rare rows.
  values *= 10 ** rng.uniform(-1, 1, size=(len(ids), 1)).astype(np.float32)
  if seed == 0:
    values[np.array(ids) == 39] = 1e-5
  return values


def gradients(ids, seed=0) -> RowGradients:
  values = jnp.asarray(values_of(ids, seed))
  return sum_duplicates(jnp.array(ids), values, num_rows=ROWS)


def run(optimizer, batches, dtype=jnp.float32):
  current = jnp.asarray(table(), dtype)
  state, history = optimizer.init(current), []
  update = jax.jit(optimizer.update, donate_argnums=(0, 1))
  for seed, ids in enumerate(batches):
    current, state = update(current, state, gradients(ids, seed), RATE)
    history.append(np.asarray(current.astype(jnp.float32)).copy())
  return history, np.asarray(state.momentum)


def by_hand(batches):
  """Float64, and one row, column or scaling after another."""
  rows, momentum = table().astype(np.float64), np.zeros((ROWS, WIDTH))
  history, still = [], []
  for seed, ids in enumerate(batches):
    values = values_of(ids, seed)
    touched = sorted(set(ids))
    u = []
    for row in touched:
      g = sum(v.astype(np.float64) for i, v in zip(ids, values) if i == row)
      momentum[row] = 0.95 * momentum[row] + g
      u.append(g + 0.95 * momentum[row])
    u = np.array(u)
    lengths = [np.linalg.norm(x) for x in u]
    for i, length in enumerate(lengths):
      if length < 1e-3 * sum(lengths) / len(lengths):
        u[i] = 0
        still.append((seed, touched[i]))
    for k in range(1, 12):
      if k % 2 == 1:
        for i in range(u.shape[0]):
          u[i] /= np.linalg.norm(u[i]) + 1e-20
      else:
        for j in range(WIDTH):
          u[:, j] /= np.linalg.norm(u[:, j]) + 1e-20
    for row, direction in zip(touched, u):
      rows[row] -= RATE * 0.18 * WIDTH**0.5 * direction
    history.append(rows.copy())
  return history, momentum, still


def test_it_is_the_transcription():
  found, momentum = run(sinkhorn(), BATCHES)
  expected, moments, still = by_hand(BATCHES)
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)
  np.testing.assert_allclose(momentum, moments, rtol=1e-5, atol=1e-6)
  # The threshold was met once, on a row whose momentum was kept all the same.
  assert still == [(0, 39)]
  np.testing.assert_array_equal(found[0][39], table()[39])


def test_momentum_of_a_row_that_does_not_move_goes_on():
  _, momentum = run(sinkhorn(), BATCHES[:1])
  np.testing.assert_allclose(momentum[39], 1e-5, rtol=1e-6)


def test_all_rows_that_move_move_by_the_same_root_mean_square():
  history, _ = run(sinkhorn(), BATCHES[1:2])
  moved = np.sqrt(np.mean((history[0] - table()) ** 2, axis=1))
  touched = sorted({*BATCHES[1]} - {39})  # 39 is under the threshold
  np.testing.assert_allclose(moved[touched], RATE * 0.18, rtol=1e-4)
  assert moved[39] == 0


def test_balanced_rows_have_norm_one_and_columns_share_evenly():
  update = jax.random.normal(jax.random.key(0), (200, 8))
  update = update * jnp.logspace(-1, 1, 8) * jnp.logspace(0, 1, 200)[:, None]
  found = balance(update, iterations=11, threshold=1e-3, eps=1e-20)
  np.testing.assert_allclose(jnp.linalg.norm(found, axis=1), 1, rtol=1e-5)
  columns = jnp.linalg.norm(found, axis=0)
  np.testing.assert_allclose(columns, (200 / 8) ** 0.5, rtol=1e-2)
  # The scaling of the rows alone would leave them far apart.
  rows = balance(update, iterations=1, threshold=1e-3, eps=1e-20)
  columns = jnp.linalg.norm(rows, axis=0)
  assert columns.max() / columns.min() > 20
  # The factor that columns are brought to goes out again.
  twice = balance(4 * update, iterations=11, threshold=1e-3, eps=1e-20)
  np.testing.assert_array_equal(found, twice)


def test_zeros_take_no_part():
  update = jax.random.normal(jax.random.key(0), (6, 4)).at[:, 2].set(0)
  # Of 1000 rows with nothing in them, the mean would hide the others' length.
  short = update.at[3].multiply(1e-2)
  padded = jnp.zeros((1006, 4)).at[500:506].set(short)
  constants = dict(iterations=11, threshold=0.1, eps=1e-20)
  alone, among = balance(short, **constants), balance(padded, **constants)
  np.testing.assert_allclose(among[500:506], alone, rtol=1e-6, atol=1e-7)
  assert not alone[3].any() and alone[2].any()
  assert not alone[:, 2].any() and jnp.isfinite(alone).all()
  assert not balance(jnp.zeros((3, 4)), **constants).any()


def test_padding_counts_for_nothing_whatever_stands_in_it():
  optimizer = sinkhorn()
  clean = gradients(BATCHES[1])
  count = len(set(BATCHES[1]))
  dirty = clean._replace(values=clean.values.at[count:].set(7.0))
  start = jnp.asarray(table())
  expected, state = optimizer.update(start, optimizer.init(start), clean, RATE)
  found, other = optimizer.update(start, optimizer.init(start), dirty, RATE)
  np.testing.assert_array_equal(found, expected)
  np.testing.assert_array_equal(other.momentum, state.momentum)


def test_untouched_rows_and_their_momentum_keep_every_bit():
  history, momentum = run(sinkhorn(), BATCHES)
  touched = sorted({row for ids in BATCHES for row in ids})
  others = np.setdiff1d(np.arange(ROWS), touched)
  np.testing.assert_array_equal(history[-1][others], table()[others])
  assert not momentum[others].any() and momentum[touched].all()
  # Row 11 was touched at the first step alone.
  np.testing.assert_array_equal(history[-1][11], history[0][11])
  _, first = run(sinkhorn(), BATCHES[:1])
  np.testing.assert_array_equal(momentum[11], first[11])


def test_first_step_equals_the_dense_form():
  (lazy,), lazy_momentum = run(sinkhorn(), BATCHES[:1])
  (dense,), dense_momentum = run(dense_sinkhorn(), BATCHES[:1])
  np.testing.assert_allclose(lazy, dense, rtol=0, atol=1e-6)
  np.testing.assert_allclose(lazy_momentum, dense_momentum, rtol=1e-6)


def test_it_equals_the_dense_form_while_every_row_is_touched():
  everything = [*range(ROWS), 3, 3, 17]
  lazy, lazy_momentum = run(sinkhorn(), [everything] * 4)
  dense, dense_momentum = run(dense_sinkhorn(), [everything] * 4)
  for a, b in zip(lazy, dense, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)
  np.testing.assert_allclose(lazy_momentum, dense_momentum, rtol=1e-5)
  # Elsewhere they differ: the dense form goes on with rows of earlier steps.
  lazy, _ = run(sinkhorn(), BATCHES)
  dense, _ = run(dense_sinkhorn(), BATCHES)
  assert abs(lazy[-1][11] - lazy[0][11]).max() == 0
  assert abs(dense[-1][11] - dense[0][11]).max() > 0.01


def test_bfloat16_table_keeps_float32_momentum():
  half = jnp.asarray(table(), jnp.bfloat16)
  found, momentum = run(sinkhorn(), BATCHES[:1], jnp.bfloat16)
  assert momentum.dtype == np.float32
  (full,), expected = run(sinkhorn(), BATCHES[:1])
  np.testing.assert_array_equal(momentum, expected)
  rounded = np.asarray(half.astype(jnp.float32))
  moved = full - table()
  np.testing.assert_allclose(found[0], rounded + moved, rtol=2**-8, atol=1e-6)
  np.testing.assert_array_equal(found[0][13], rounded[13])


@pytest.mark.parametrize("make", [sinkhorn, dense_sinkhorn])
def test_dtypes(make):
  half = jnp.asarray(table(), jnp.bfloat16)
  optimizer = make()
  new, state = optimizer.update(half, optimizer.init(half), gradients([4]), 0.1)
  assert new.dtype == jnp.bfloat16 and state.momentum.dtype == jnp.float32


def test_the_update_is_written_in_place():
  optimizer = sinkhorn()
  current = jnp.array(table())
  state = optimizer.init(current)
  update = jax.jit(optimizer.update, donate_argnums=(0, 1))
  compiled = update.lower(current, state, gradients([1]), 0.1).compile()
  before = [x.unsafe_buffer_pointer() for x in (current, *state)]
  current, state = compiled(current, state, gradients([1]), 0.1)
  assert before == [x.unsafe_buffer_pointer() for x in (current, *state)]


@pytest.mark.parametrize("make", [sinkhorn, dense_sinkhorn])
@pytest.mark.parametrize(
  "wrong",
  [
    {"momentum": 1.0},
    {"momentum": -0.1},
    {"iterations": 10},
    {"iterations": -1},
    {"iterations": 0},
    {"threshold": 1.0},
    {"threshold": -1e-3},
    {"scale": 0.0},
    {"scale": float("inf")},
    {"eps": 0.0},
  ],
)
def test_refuses_bad_constants(make, wrong):
  ((name, value),) = wrong.items()
  with pytest.raises(InputError, match=f"^{name}: {value}; valid: "):
    make(**wrong)


@pytest.mark.parametrize("size", [1e-35, 1e-30, 1e-10, 1e10, 1e30, 1e37])
@pytest.mark.parametrize("make", [sinkhorn, dense_sinkhorn])
def test_the_size_of_the_gradients_changes_nothing(size, make):
  optimizer = make()
  ordinary = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
  table = jnp.zeros((5, 4))

  def moved(values):
    gradients = RowGradients(jnp.arange(3), jnp.asarray(values))
    update = jax.jit(optimizer.update)
    return update(table, optimizer.init(table), gradients, 0.1)

  found, state = moved(np.float32(size) * ordinary)
  np.testing.assert_allclose(found, moved(ordinary)[0], rtol=1e-4, atol=1e-6)
  assert jnp.isfinite(state.momentum).all()
