"""Row optimizers: against dense ones, row by row, and spread over devices."""

import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from engram_jax.errors import InputError
from engram_jax.memory.row_sparse import (
  RowGradients,
  dense,
  gather_rows,
  row_sparse,
  scatter_rows,
  squared_norm,
  state_bytes_per_row,
  sum_duplicates,
)
from engram_jax.memory.row_transformations import (
  scale_by_adam_per_row,
  scale_by_rowwise_adagrad,
)
from engram_jax.memory.sinkhorn import sinkhorn

ROWS, WIDTH = 40, 3


def adam(bias_correction="global"):
  """Lazy Adam with the count of all steps, or with each row's own."""
  if bias_correction == "row":
    return row_sparse(scale_by_adam_per_row())
  return row_sparse(optax.scale_by_adam(b2=0.95))


def dense_adam():
  return dense(optax.scale_by_adam(b2=0.95))


def adagrad(**constants):
  return row_sparse(scale_by_rowwise_adagrad(**constants))


#: Of optax: moments, one moment, a sign, an accumulator.
TRANSFORMATIONS = {
  "sgd with momentum": lambda: optax.trace(0.9),
  "adam": lambda: optax.scale_by_adam(),
  "rmsprop": lambda: optax.scale_by_rms(),
  "lion": lambda: optax.scale_by_lion(),
  "adagrad": lambda: optax.scale_by_rss(),
}
#: The same with a learning rate of their own.
ALIASES = {
  "sgd with momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
  "adam": lambda: optax.adamw(optax.linear_schedule(0.1, 0.01, 4)),
  "rmsprop": lambda: optax.rmsprop(0.1, centered=True),
  "lion": lambda: optax.lion(0.1),
  "adagrad": lambda: optax.adagrad(0.1),
}


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
  (lazy,), _ = run(adam(bias_correction), ids)
  (dense,), _ = run(dense_adam(), ids)
  np.testing.assert_allclose(lazy, dense, rtol=0, atol=3e-7)


@pytest.mark.parametrize("bias_correction", ["global", "row"])
def test_rows_touched_at_every_step_equal_dense_adam(bias_correction):
  always = [2, 30, 31]
  batches = [[*always, 2, 5 + i, 12 - i] for i in range(6)]
  lazy, _ = run(adam(bias_correction), batches)
  dense, _ = run(dense_adam(), batches)
  for a, b in zip(lazy, dense):
    np.testing.assert_allclose(a[always], b[always], rtol=0, atol=1e-6)
  # The difference elsewhere is real: dense Adam moves a row after its last
  # gradient, by momentum; the lazy one does not.
  assert abs(lazy[-1][5] - lazy[0][5]).max() == 0
  assert abs(dense[-1][5] - dense[0][5]).max() > 0.05


def test_untouched_rows_and_their_moments_keep_every_bit():
  optimizer = adam("row")
  batches = [[1, 2, 2], [2, 3, 3]]
  (_, after), state = run(optimizer, batches)
  touched = [1, 2, 3]
  others = np.setdiff1d(np.arange(ROWS), touched)
  np.testing.assert_array_equal(after[others], np.asarray(table())[others])
  assert not state.mu[others].any() and not state.nu[others].any()
  assert state.count[jnp.array(touched)].tolist() == [1, 2, 1]


def test_bias_correction_decides_the_first_step_of_a_late_row():
  batches = [[0]] * 200 + [[1]]
  for bias_correction, share in (("row", 1.0), ("global", 0.1 / 0.05**0.5)):
    history, _ = run(adam(bias_correction), batches)
    length = abs(history[-1][1] - history[-2][1])
    np.testing.assert_allclose(length, 0.1 * share, rtol=2e-3)


def test_bfloat16_table_keeps_float32_moments():
  optimizer = adam()
  half = table().astype(jnp.bfloat16)
  new, state = optimizer.update(
    half, optimizer.init(half), gradients([4, 4]), 0.1
  )
  assert new.dtype == jnp.bfloat16 and state.mu.dtype == jnp.float32
  assert (new[4] != half[4]).all() and (new[5] == half[5]).all()


def test_the_update_is_written_in_place():
  optimizer = adam()
  current, state = table(), optimizer.init(table())
  update = jax.jit(optimizer.update, donate_argnums=(0, 1))
  compiled = update.lower(current, state, gradients([1]), 0.1).compile()
  before = [x.unsafe_buffer_pointer() for x in (current, *state[1:3])]
  current, state = compiled(current, state, gradients([1]), 0.1)
  after = [x.unsafe_buffer_pointer() for x in (current, *state[1:3])]
  assert before == after


def test_read_and_write_leave_padding_out():
  array = jnp.arange(8, dtype=jnp.bfloat16).reshape(4, 2)
  ids = jnp.array([3, 1, 4, 5], jnp.int32)
  rows = gather_rows(array, ids)
  assert rows.tolist() == [[6, 7], [2, 3], [0, 0], [0, 0]]
  written = scatter_rows(array, ids, rows.astype(jnp.float32) + 10)
  assert written.dtype == jnp.bfloat16
  assert written.tolist() == [[0, 1], [12, 13], [4, 5], [16, 17]]
  counts = scatter_rows(jnp.zeros(4, jnp.int32), ids, jnp.arange(1, 5))
  assert counts.tolist() == [0, 2, 0, 1]


@pytest.mark.parametrize("width", [64, 256])
def test_state_bytes_per_row(width):
  expected = {
    adam(): 8 * width,
    adam("row"): 8 * width + 4,
    dense_adam(): 8 * width,
    adagrad(): 4,
    sinkhorn(): 4 * width,
  }
  for optimizer, size in expected.items():
    assert state_bytes_per_row(optimizer, width) == size
    # What is allocated, less the one step count.
    state = optimizer.init(jnp.zeros((10, width)))
    held = sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim)
    assert held == 10 * size


def test_dense_adam_of_a_bfloat16_table_keeps_float32_moments():
  optimizer = dense_adam()
  half = table().astype(jnp.bfloat16)
  state = optimizer.init(half)
  new, after = optimizer.update(half, state, gradients([4, 4]), 0.1)
  assert new.dtype == jnp.bfloat16
  assert {state.mu.dtype, after.mu.dtype, after.nu.dtype} == {
    jnp.dtype(jnp.float32)
  }


@pytest.mark.parametrize("initial", [0.0, 0.25])
def test_rowwise_adagrad_is_the_formula_row_by_row(initial):
  rng = np.random.default_rng(0)
  optimizer = adagrad(initial=initial, eps=1e-3)
  current, state = table(), optimizer.init(table())
  update = jax.jit(optimizer.update, donate_argnums=(0, 1))
  expected = np.asarray(table(), np.float64)
  accumulator = np.full(ROWS, initial)
  for ids in ([5, 5, 6, 39, 0, 5], [6, 7, 6, 1, 2, 3], [5, 39, 8, 8, 8, 8]):
    values = rng.normal(size=(6, WIDTH))
    # By hand: what each row was given, then one scalar for each of them.
    for row in set(ids):
      g = sum(v for i, v in zip(ids, values) if i == row)
      accumulator[row] += (g @ g) / WIDTH
      expected[row] -= 0.1 * g / (accumulator[row] ** 0.5 + 1e-3)
    found = sum_duplicates(
      jnp.array(ids), jnp.asarray(values, jnp.float32), num_rows=ROWS
    )
    current, state = update(current, state, found, 0.1)
  assert state.accumulator.dtype == jnp.float32
  np.testing.assert_allclose(state.accumulator, accumulator, rtol=1e-5)
  np.testing.assert_allclose(current, expected, rtol=0, atol=1e-6)
  untouched = np.setdiff1d(np.arange(ROWS), [0, 1, 2, 3, 5, 6, 7, 8, 39])
  np.testing.assert_array_equal(
    np.asarray(current)[untouched], np.asarray(table())[untouched]
  )
  assert (np.asarray(state.accumulator)[untouched] == initial).all()


def test_rowwise_adagrad_on_a_row_without_gradient_moves_nothing():
  optimizer = adagrad()
  zeros = RowGradients(jnp.array([4]), jnp.zeros((1, WIDTH)))
  new, state = optimizer.update(table(), optimizer.init(table()), zeros, 0.1)
  np.testing.assert_array_equal(new, table())
  assert not state.accumulator.any()


def test_rowwise_adagrad_on_a_bfloat16_table():
  optimizer = adagrad()
  half = table().astype(jnp.bfloat16)
  new, state = optimizer.update(
    half, optimizer.init(half), gradients([4, 4]), 0.1
  )
  assert new.dtype == jnp.bfloat16 and state.accumulator.dtype == jnp.float32
  assert (new[4] != half[4]).all() and (new[5] == half[5]).all()


def test_rowwise_adagrad_is_written_in_place():
  optimizer = adagrad()
  current, state = table(), optimizer.init(table())
  update = jax.jit(optimizer.update, donate_argnums=(0, 1))
  compiled = update.lower(current, state, gradients([1]), 0.1).compile()
  before = [x.unsafe_buffer_pointer() for x in (current, *state)]
  current, state = compiled(current, state, gradients([1]), 0.1)
  assert before == [x.unsafe_buffer_pointer() for x in (current, *state)]


def test_eight_devices_do_what_one_does():
  """Every optimizer through the exchange; in a process of its own."""
  program = """
import jax, jax.numpy as jnp, numpy as np, optax
from engram_jax import sharding
from engram_jax.memory import exchange
from engram_jax.memory.row_sparse import dense, row_sparse, sum_duplicates
from engram_jax.memory.row_transformations import (
  scale_by_adam_per_row, scale_by_rowwise_adagrad)
from engram_jax.memory.sinkhorn import dense_sinkhorn, sinkhorn

OPTIMIZERS = {
  "lazy_adam": row_sparse(optax.scale_by_adam(b2=0.95)),
  "lazy_adam_row_steps": row_sparse(scale_by_adam_per_row()),
  "dense_adam": dense(optax.scale_by_adam(b2=0.95)),
  "rowwise_adagrad": row_sparse(scale_by_rowwise_adagrad()),
  "sinkhorn": sinkhorn(),
  "dense_sinkhorn": dense_sinkhorn(),
}
mesh = jax.make_mesh((1, 4, 2, 1), sharding.AXES,
                     axis_types=(jax.sharding.AxisType.Auto,) * 4)
rng = np.random.default_rng(0)
table = rng.normal(size=(80, 5)).astype(np.float32)
batches = []
for step in range(3):
  # The last three devices own nothing that is read; duplicates are many.
  ids = rng.integers(0, 50, (8, 2, 3)).astype(np.int32)
  values = rng.normal(size=(8, 2, 3, 5)).astype(np.float32)
  values *= rng.lognormal(size=(8, 2, 3, 1)).astype(np.float32)
  # Under sinkhorn's threshold, but not by the mean of their own device.
  values[ids < 10] *= 1e-5
  batches.append((ids, values))

def arrays(table, state):
  return [np.asarray(x) for x in jax.tree.leaves((table, state))]

for name, optimizer in OPTIMIZERS.items():
  one, state = jnp.asarray(table), optimizer.init(jnp.asarray(table))
  alone = [arrays(one, state)]
  update = jax.jit(optimizer.update)
  for ids, values in batches:
    summed = sum_duplicates(jnp.asarray(ids), jnp.asarray(values), num_rows=80)
    one, state = update(one, state, summed, 0.1)
    alone.append(arrays(one, state))
  for strategy in exchange.STRATEGIES:
    def step(many, state, ids, values):
      _, plan = exchange.lookup({1: many}, {1: ids}, strategy=strategy)
      owned = exchange.reduce_row_gradients(plan, {1: values}, num_rows={1: 80})
      return exchange.update(optimizer, many, state, owned[1], 0.1)
    with jax.set_mesh(mesh):
      by_rows = lambda x: jax.device_put(x, jax.NamedSharding(
        mesh, sharding.TABLE if x.ndim and x.shape[0] == 80 else jax.P()))
      many, state = jax.tree.map(by_rows, (table, optimizer.init(
        jnp.asarray(table))))
      step = jax.jit(step, donate_argnums=(0, 1))
      for i, (ids, values) in enumerate(batches):
        many, state = step(many, state, ids, values)
        assert many.sharding.spec == sharding.TABLE, many.sharding
        for a, b in zip(arrays(many, state), alone[i + 1], strict=True):
          np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6, err_msg=name)
        if not name.startswith("dense"):
          np.testing.assert_array_equal(np.asarray(many)[50:], table[50:])
  print(name, "done")
"""
  flags = "--xla_force_host_platform_device_count=8"
  done = subprocess.run(
    [sys.executable, "-c", program],
    env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert done.stdout.count("done") == 6


@pytest.mark.parametrize(
  "wrong",
  [{"initial": -1.0}, {"initial": float("inf")}, {"eps": 0.0}, {"eps": -1e-8}],
)
def test_rowwise_adagrad_refuses_bad_constants(wrong):
  ((name, value),) = wrong.items()
  with pytest.raises(InputError, match=f"^{name}: {value}; valid: a finite"):
    adagrad(**wrong)


def test_refusals():
  with pytest.raises(InputError, match="num_rows: 2147483646"):
    sum_duplicates(
      jnp.zeros(4, jnp.int32), jnp.zeros((4, 1)), num_rows=2**31 - 2
    )


def test_row_ids_ascend_padding_included():
  # What reading and writing rows promise XLA. Ids R are another device's.
  ids = jnp.array([7, 3, 9, 3, 9, 9, 0, 7], jnp.int32)
  found = sum_duplicates(ids, jnp.ones((8, WIDTH)), num_rows=9).row_ids
  assert (jnp.diff(found) > 0).all(), found


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.parametrize("own_rate", [False, True])
def test_optax_on_rows_touched_at_every_step_is_the_dense_form(name, own_rate):
  make, rate = TRANSFORMATIONS[name], 0.1
  if own_rate:
    make, rate = ALIASES[name], None
  always = [2, 30, 31]
  batches = [[*always, 2, 5 + i, 12 - i] for i in range(6)]
  sparse, state = run(row_sparse(make()), batches, rate)
  whole, dense_state = run(dense(make()), batches, rate)
  for a, b in zip(sparse, whole):
    np.testing.assert_allclose(a[always], b[always], rtol=1e-5, atol=1e-6)
  assert (sparse[0][always] != table()[jnp.array(always)]).all()

  def of_rows(leaf):
    return leaf[jnp.array(always)] if leaf.ndim else leaf

  chex.assert_trees_all_close(
    *(jax.tree.map(of_rows, x) for x in (state, dense_state)),
    rtol=1e-5,
    atol=1e-6,
  )
  # A row that was never touched keeps every bit, decay or not.
  np.testing.assert_array_equal(sparse[-1][20], table()[20])


OPTIMIZERS = {
  "lazy": adam(),
  "row steps": adam("row"),
  "dense": dense_adam(),
  "adagrad": adagrad(),
}


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-30, 1e17, 1e30, 3e38])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gradient_of_any_size_moves_a_row_and_leaves_it_movable(name, size):
  optimizer = OPTIMIZERS[name]
  table = jnp.ones((3, 2))
  update, state = jax.jit(optimizer.update), optimizer.init(table)
  huge = RowGradients(jnp.array([1, 3]), jnp.full((2, 2), size).at[1].set(0))
  for _ in range(3):
    before = table
    table, state = update(table, state, huge, 0.1)
    if size > 1:
      # About the learning rate, and never nothing.
      change = np.abs(table - before)[1]
      assert ((change > 0.03) & (change < 0.2)).all()
  for leaf in jax.tree.leaves((table, state)):
    assert np.isfinite(leaf).all()
  np.testing.assert_array_equal(table[jnp.array([0, 2])], 1)


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gradient_that_is_no_number_stays_visible(name, value):
  optimizer = OPTIMIZERS[name]
  table = jnp.ones((3, 2))
  gradients = RowGradients(jnp.array([1]), jnp.full((1, 2), value))
  found, state = optimizer.update(table, optimizer.init(table), gradients, 0.1)
  leaves = jax.tree.leaves((found, state))
  assert not all(np.isfinite(leaf).all() for leaf in leaves)


@pytest.mark.parametrize(
  "make, constant",
  [
    (scale_by_adam_per_row, {"eps": 1e-50}),
    (scale_by_adam_per_row, {"b2": 1 - 1e-9}),
    (scale_by_adam_per_row, {"b1": 1.0}),
    (scale_by_rowwise_adagrad, {"eps": 0.0}),
    (scale_by_rowwise_adagrad, {"eps": 1e-50}),
  ],
)
def test_constants_that_float32_cannot_tell_from_0_or_1(make, constant):
  (name,) = constant
  with pytest.raises(InputError, match=f"^{name}: "):
    make(**constant)
