"""Row-sparse updates: a step costs what it touches, not what the table holds.

A batch reads U = B * L * K rows, many of them twice. `sum_duplicates` turns
the gradient with respect to these rows into one entry per distinct row; a row
optimizer then moves those rows and their state alone. Table and state should
be donated to the jitted step: then XLA writes in place, and the cost of a
step is flat in R (`experiments/benchmarks/table_scaling.py`).

`lazy_adam` is Adam on the rows that were touched. It equals dense Adam at the
first step, and on any row touched at every step. It differs on the others: a
dense Adam goes on moving a row by its momentum after its last gradient, and
decays both moments meanwhile; the lazy one leaves row and moments exactly as
they were. `dense_adam` is the dense one: the oracle, and the form to compare
with where the table is small.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from engram_jax.errors import require


class RowGradients(NamedTuple):
  """Gradients of distinct rows of one table.

  Attributes:
    row_ids: int32 [U], distinct. Entries >= R are padding: their values are 0
      and updates drop them.
    values: float32 [U, d].
  """

  row_ids: Int[Array, "U"]
  values: Float[Array, "U d"]


class RowOptimizer(NamedTuple):
  """A pair of pure functions, as optax's, over a table and its rows.

  Attributes:
    init: `table -> state`.
    update: `(table, state, RowGradients, learning_rate) -> (table, state)`.
      The rate is an argument because it follows the backbone's schedule.
  """

  init: Callable[[Float[Array, "R d"]], Any]
  update: Callable[..., tuple[Float[Array, "R d"], Any]]


def sum_duplicates(
  row_ids: Int[Array, "*S"], gradients: Float[Array, "*S d"], *, num_rows: int
) -> RowGradients:
  """Sums the gradients of equal ids, in a fixed order (a stable sort).

  Args:
    row_ids: int32 [...], U ids in all, each below `num_rows`.
    gradients: [..., d], any float dtype; summed in float32.
    num_rows: R. R + U must stay below 2**31.

  Returns:
    `RowGradients` of U entries, the distinct rows first, in ascending order.

  Raises:
    InputError: R + U does not fit int32.
  """
  ids = row_ids.reshape(-1)
  count = ids.size
  valid = f"below {2**31 - count}, to number {count} padding entries behind it"
  require(num_rows + count < 2**31, "num_rows", num_rows, valid)
  values = gradients.reshape(count, -1).astype(jnp.float32)
  order = jnp.argsort(ids, stable=True)
  ids, values = ids[order], values[order]
  is_first = jnp.concatenate([jnp.ones(1, bool), ids[1:] != ids[:-1]])
  segment = jnp.cumsum(is_first) - 1
  sums = jax.ops.segment_sum(
    values, segment, num_segments=count, indices_are_sorted=True
  )
  # Padding ids are out of bounds, to be dropped, and distinct, so that a
  # scatter may rely on unique ids.
  padding = num_rows + jnp.arange(count, dtype=ids.dtype)
  distinct = padding.at[segment].set(ids, indices_are_sorted=True)
  return RowGradients(distinct, sums)


def squared_norm(gradients: RowGradients) -> Float[Array, ""]:
  """Squared L2 norm: what the dense gradient of the table would have."""
  return jnp.sum(jnp.square(gradients.values))


class LazyAdamState(NamedTuple):
  """State of `lazy_adam`.

  Attributes:
    step: int32, updates so far.
    mean: float32 [R, d], first moment.
    variance: float32 [R, d], second moment.
    touches: int32 [R], updates per row, with `bias_correction="row"`; [0]
      otherwise.
  """

  step: Int[Array, ""]
  mean: Float[Array, "R d"]
  variance: Float[Array, "R d"]
  touches: Int[Array, "touches"]


def lazy_adam(
  *,
  b1: float = 0.9,
  b2: float = 0.95,
  eps: float = 1e-8,
  bias_correction: str = "global",
) -> RowOptimizer:
  """Adam that touches only the rows with a gradient. No weight decay.

  Args:
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    bias_correction: which count t corrects the moments by 1 - b^t. "global":
      the optimizer's steps, as in dense Adam; a row first touched late then
      moves (1 - b1) / sqrt(1 - b2) of `learning_rate` (0.45 of it with the
      defaults). "row": the row's own touches, so that the first step of every
      row has length `learning_rate`; costs 4 bytes more a row.
      `experiments/results/row_optimizers.json` compares the two.

  Returns:
    A `RowOptimizer` whose state is a `LazyAdamState`, 8 d bytes a row.
  """
  valid = "global or row"
  known = bias_correction in ("global", "row")
  require(known, "bias_correction", bias_correction, valid)
  per_row = bias_correction == "row"

  def init(table: Float[Array, "R d"]) -> LazyAdamState:
    return LazyAdamState(
      step=jnp.zeros((), jnp.int32),
      # Two buffers: one array in both places could not be donated.
      mean=jnp.zeros(table.shape, jnp.float32),
      variance=jnp.zeros(table.shape, jnp.float32),
      touches=jnp.zeros(table.shape[0] if per_row else 0, jnp.int32),
    )

  def update(
    table: Float[Array, "R d"],
    state: LazyAdamState,
    gradients: RowGradients,
    learning_rate: Float[Array, ""] | float,
  ) -> tuple[Float[Array, "R d"], LazyAdamState]:
    ids, values = gradients

    def read(array):
      return array.at[ids].get(mode="fill", fill_value=0, unique_indices=True)

    def write(array, rows):
      rows = rows.astype(array.dtype)
      return array.at[ids].set(rows, mode="drop", unique_indices=True)

    step = state.step + 1
    touches = state.touches
    if per_row:
      row_steps = read(touches) + 1
      touches = write(touches, row_steps)
      t = row_steps[:, None]
    else:
      t = step
    mean = b1 * read(state.mean) + (1 - b1) * values
    variance = b2 * read(state.variance) + (1 - b2) * jnp.square(values)
    ratio = (mean / (1 - b1**t)) / (jnp.sqrt(variance / (1 - b2**t)) + eps)
    rows = read(table).astype(jnp.float32) - learning_rate * ratio
    return write(table, rows), LazyAdamState(
      step, write(state.mean, mean), write(state.variance, variance), touches
    )

  return RowOptimizer(init, update)


def dense_adam(
  *, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8
) -> RowOptimizer:
  """Adam over the whole table by optax: the oracle; every step costs R."""
  adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

  def update(table, state, gradients, learning_rate):
    dense = jnp.zeros(table.shape, jnp.float32)
    dense = dense.at[gradients.row_ids].add(gradients.values, mode="drop")
    direction, state = adam.update(dense, state)
    table = (table - learning_rate * direction).astype(table.dtype)
    return table, state

  return RowOptimizer(adam.init, update)
