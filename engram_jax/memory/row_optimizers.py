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

State is what a table costs besides itself. `rowwise_adagrad` keeps one scalar a
row, `sinkhorn` (`memory/sinkhorn.py`) one moment. Bytes a row of
`state_bytes_per_row`, next to the row's own in float32:

                            d = 64   d = 256
  the row itself               256      1024
  dense_adam, lazy_adam        512      2048
  lazy_adam, own row steps     516      2052
  sinkhorn                     256      1024
  rowwise_adagrad                4         4
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Shaped

from engram_jax.errors import require

#: Of larger numbers float32 cannot sum many squares.
LARGEST_GRADIENT = 2.0**55


class RowGradients(NamedTuple):
  """Gradients of distinct rows of one table.

  Attributes:
    row_ids: int32 [U], distinct and ascending: XLA:TPU sorts ids that are not
      promised to be sorted, before it reads and writes rows. Entries >= R are
      padding: their values are 0 and updates drop them.
    values: float32 [U, d].
  """

  row_ids: Int[Array, "U"]
  values: Float[Array, "U d"]


class RowOptimizer(NamedTuple):
  """A pair of pure functions, as optax's, over a table and its rows.

  Attributes:
    init: `table -> state`.
    update: `(table, state, RowGradients, learning_rate, *, axes=()) -> (table,
      state)`. The rate is an argument because it follows the backbone's
      schedule. `axes` names the mesh axes that the rows are spread over when
      it is called on one device's part of them (`exchange.update`): what it
      takes of several rows together it must sum over these.
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


def read_rows(
  array: Shaped[Array, "R *d"], row_ids: Int[Array, "U"]
) -> Shaped[Array, "U *d"]:
  """Rows of `array` by ascending ids; zeros for padding (ids >= R)."""
  return array.at[row_ids].get(
    mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True
  )


def write_rows(
  array: Shaped[Array, "R *d"],
  row_ids: Int[Array, "U"],
  rows: Shaped[Array, "U *d"],
) -> Shaped[Array, "R *d"]:
  """`array`, of its own dtype, with `rows` at ascending ids; drops padding."""
  rows = rows.astype(array.dtype)
  return array.at[row_ids].set(
    rows, mode="drop", unique_indices=True, indices_are_sorted=True
  )


def move_rows(
  table: Float[Array, "R d"],
  row_ids: Int[Array, "U"],
  change: Float[Array, "U d"],
) -> Float[Array, "R d"]:
  """`table` with `change` taken from distinct rows, in float32."""
  rows = read_rows(table, row_ids).astype(jnp.float32) - change
  return write_rows(table, row_ids, rows)


def dense_gradient(
  table: Float[Array, "R d"], gradients: RowGradients
) -> Float[Array, "R d"]:
  """The same gradients as a float32 array of the table's shape."""
  dense = jnp.zeros(table.shape, jnp.float32)
  return dense.at[gradients.row_ids].add(gradients.values, mode="drop")


def squarable(values: Float[Array, "*S"]) -> Float[Array, "*S"]:
  """Gradients whose squares can be summed: what is beyond 2^55 counts as 2^55.

  An update that divides by the root of squares moves as far for either. The
  square of a larger one would be infinite, and the row would never move again.
  Numbers that are not finite stay so, to be seen.
  """
  limited = jnp.clip(values, -LARGEST_GRADIENT, LARGEST_GRADIENT)
  return jnp.where(jnp.isfinite(values), limited, values)


def require_decay(name: str, value: float) -> None:
  """Refuses a decay that is outside 0 <= b < 1, or becomes 1 in float32."""
  ok = 0 <= value < 1 and np.float32(value) < 1
  require(ok, name, value, "0 <= b < 1, and at most 1 - 2**-24")


def require_eps(value: float) -> None:
  """Refuses what is not above 0 in float32: 0 / 0 for a gradient of zeros."""
  least = float(np.finfo(np.float32).tiny)
  ok = least <= value < math.inf
  require(ok, "eps", value, f"a finite number, at least {least:.3g}")


def state_bytes_per_row(optimizer: RowOptimizer, width: int) -> int:
  """Bytes of state that one more row of a table costs.

  Args:
    optimizer: asked for the shapes of its state; nothing is allocated.
    width: d.
  """

  def size(rows: int) -> int:
    table = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    leaves = jax.tree.leaves(jax.eval_shape(optimizer.init, table))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)

  # The difference leaves out what does not grow with the table.
  return size(2) - size(1)


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

  Raises:
    InputError: a constant out of its range.
  """
  valid = "global or row"
  known = bias_correction in ("global", "row")
  require(known, "bias_correction", bias_correction, valid)
  require_decay("b1", b1)
  require_decay("b2", b2)
  require_eps(eps)
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
    *,
    axes: Sequence[str] = (),
  ) -> tuple[Float[Array, "R d"], LazyAdamState]:
    del axes  # no row looks at another
    ids, values = gradients.row_ids, squarable(gradients.values)
    step = state.step + 1
    touches = state.touches
    if per_row:
      row_steps = read_rows(touches, ids) + 1
      touches = write_rows(touches, ids, row_steps)
      t = row_steps[:, None]
    else:
      t = step
    mean = b1 * read_rows(state.mean, ids) + (1 - b1) * values
    square = (1 - b2) * jnp.square(values)
    variance = b2 * read_rows(state.variance, ids) + square
    ratio = (mean / (1 - b1**t)) / (jnp.sqrt(variance / (1 - b2**t)) + eps)
    return move_rows(table, ids, learning_rate * ratio), LazyAdamState(
      step=step,
      mean=write_rows(state.mean, ids, mean),
      variance=write_rows(state.variance, ids, variance),
      touches=touches,
    )

  return RowOptimizer(init, update)


def dense_adam(
  *, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8
) -> RowOptimizer:
  """Adam over the whole table by optax: the oracle; every step costs R."""
  require_decay("b1", b1)
  require_decay("b2", b2)
  require_eps(eps)
  adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

  def init(table):
    # optax gives the moments the table's dtype, if that is narrower.
    return adam.init(table.astype(jnp.float32))

  def update(table, state, gradients, learning_rate, *, axes=()):
    del axes  # no row looks at another
    dense = squarable(dense_gradient(table, gradients))
    direction, state = adam.update(dense, state)
    table = (table - learning_rate * direction).astype(table.dtype)
    return table, state

  return RowOptimizer(init, update)


class RowwiseAdagradState(NamedTuple):
  """State of `rowwise_adagrad`.

  Attributes:
    accumulator: float32 [R], the sum over a row's updates of its gradient's
      mean square.
  """

  accumulator: Float[Array, "R"]


def rowwise_adagrad(*, initial: float = 0.0, eps: float = 1e-8) -> RowOptimizer:
  """Adagrad with one scalar a row, as FBGEMM's exact rowwise Adagrad.

    a   <- a + mean over d of g^2
    row <- row - learning_rate * g / (sqrt(a) + eps)

  Untouched rows stay as they are, and so they do in the dense form: without a
  gradient Adagrad moves nothing. A row's first step has RMS `learning_rate`
  (with `initial` = 0), and its steps shrink with its own touches alone: a rare
  row goes on learning.

  Args:
    initial: the accumulator of a row never touched; more of it makes the first
      steps of a row shorter.
    eps: added to the root of the accumulator.

  Returns:
    A `RowOptimizer` whose state is a `RowwiseAdagradState`, 4 bytes a row.

  Raises:
    InputError: a constant out of its range.
  """
  valid = "a finite number >= 0"
  require(0 <= initial < math.inf, "initial", initial, valid)
  require_eps(eps)

  def init(table: Float[Array, "R d"]) -> RowwiseAdagradState:
    return RowwiseAdagradState(jnp.full(table.shape[0], initial, jnp.float32))

  def update(
    table: Float[Array, "R d"],
    state: RowwiseAdagradState,
    gradients: RowGradients,
    learning_rate: Float[Array, ""] | float,
    *,
    axes: Sequence[str] = (),
  ) -> tuple[Float[Array, "R d"], RowwiseAdagradState]:
    del axes  # no row looks at another
    ids, values = gradients.row_ids, squarable(gradients.values)
    square = jnp.mean(jnp.square(values), axis=1)
    total = read_rows(state.accumulator, ids) + square
    ratio = values / (jnp.sqrt(total) + eps)[:, None]
    accumulator = write_rows(state.accumulator, ids, total)
    table = move_rows(table, ids, learning_rate * ratio)
    return table, RowwiseAdagradState(accumulator)

  return RowOptimizer(init, update)
