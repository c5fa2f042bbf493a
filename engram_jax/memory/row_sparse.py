"""Row-sparse updates: a step costs what it touches, not what the table holds.

A batch reads U = B * L * K rows, many of them twice. `sum_duplicates` turns
the gradient with respect to these rows into one entry per distinct row.
`row_sparse` then lets any row-wise optax transformation move those rows:

  state of the touched rows   gathered   [U, ...]
  optax transformation        on rows and state
  rows and state              scattered; scalars (a step count) are replaced

Table and state should be donated to the jitted step: then XLA writes in place,
and the cost of a step is flat in R.

`row_sparse(optax.scale_by_adam())` is lazy Adam. It equals dense Adam at the
first step, and on any row touched at every step. It differs on the others: a
dense Adam goes on moving a row by its momentum after its last gradient, and
decays both moments meanwhile; the lazy one leaves row and moments exactly as
they were. `dense(tx)` is the dense form: the oracle, and the form to compare
with where the table is small.

What couples rows cannot be made of a row-wise transformation: the
Sinkhorn-balanced update has a file of its own (`sinkhorn.py`).

State is what a table costs besides itself. Bytes a row of
`state_bytes_per_row`, next to the row's own in float32:

                                         d = 64   d = 256
  the row itself                            256      1024
  optax.scale_by_adam()                     512      2048
  scale_by_adam_per_row()                   516      2052
  sinkhorn                                  256      1024
  scale_by_rowwise_adagrad()                  4         4
"""

import functools
import math
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Shaped

from engram_jax.errors import InputError, require

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
    init: `table -> state`. Each array of the state has one entry a row, or is a
      scalar for the whole table.
    update: `(table, state, RowGradients, learning_rate, *, axes=()) -> (table,
      state)`. The rate is an argument because it follows the backbone's
      schedule; None where the optimizer has one of its own. `axes` names the
      mesh axes that the rows are spread over when it is called on one device's
      part of them (`exchange.update`): what it takes of several rows together
      it must sum over these.
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


def gather_rows(
  array: Shaped[Array, "R *d"], row_ids: Int[Array, "U"]
) -> Shaped[Array, "U *d"]:
  """Rows of `array` by ascending ids; zeros for padding (ids >= R).

  Args:
    array: [R, ...].
    row_ids: integers [U], distinct and ascending.
  """
  return array.at[row_ids].get(
    mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True
  )


def scatter_rows(
  array: Shaped[Array, "R *d"],
  row_ids: Int[Array, "U"],
  rows: Shaped[Array, "U *d"],
) -> Shaped[Array, "R *d"]:
  """`array`, of its own dtype, with `rows` at ascending ids; drops padding.

  Args:
    array: [R, ...].
    row_ids: integers [U], distinct and ascending.
    rows: [U, ...], the new rows.
  """
  rows = rows.astype(array.dtype)
  return array.at[row_ids].set(
    rows, mode="drop", unique_indices=True, indices_are_sorted=True
  )


def move_rows(
  table: Float[Array, "R d"],
  row_ids: Int[Array, "U"],
  change: Float[Array, "U d"],
) -> Float[Array, "R d"]:
  """`table` with `change` taken from distinct rows, in float32.

  Args:
    table: [R, d].
    row_ids: integers [U], distinct and ascending.
    change: [U, d], what is subtracted.
  """
  rows = gather_rows(table, row_ids).astype(jnp.float32) - change
  return scatter_rows(table, row_ids, rows)


def dense_gradient(
  table: Float[Array, "R d"], gradients: RowGradients
) -> Float[Array, "R d"]:
  """The same gradients as a float32 array of the table's shape.

  Args:
    table: [R, d], of which only the shape counts.
    gradients: summed gradients of distinct rows.
  """
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
  """Refuses a decay that is outside 0 <= b < 1, or becomes 1 in float32.

  Args:
    name: name of the decay, for the error line.
    value: the decay to check.
  """
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


def row_sparse(transformation: optax.GradientTransformation) -> RowOptimizer:
  """Lets a row-wise optax transformation update touched rows alone.

  Rows without a gradient in a step keep every bit, and so does their state: no
  momentum moves them, no decay shrinks them. Scalars of the state, such as a
  step count, go on at every step. A gradient beyond 2^55 counts as 2^55: its
  square would be infinite in float32 (`squarable`).

  Example:
    >>> row_tx = row_sparse(optax.scale_by_adam(b2=0.95))
    >>> state = row_tx.init(table)
    >>> table, state = row_tx.update(table, state, row_gradients, 5e-3)

  Args:
    transformation: with or without a learning rate of its own. One without
      (`optax.scale_by_adam()`) is given the rate at each update,
      `row <- row - learning_rate * direction`; one that has it
      (`optax.adam(1e-3)`) is given None, `row <- row + update`.

  Returns:
    A `RowOptimizer` whose state is the transformation's, in float32 whatever
    the table's dtype.

  Raises:
    InputError: a transformation that is not row-wise: its state has arrays
      that are neither scalars nor of one entry a row; or, from `init` or the
      first `update`, what it does to a row depends on other rows (a global
      norm, a factored moment, noise).
  """
  name = "row_sparse transformation"
  _require_state_of_rows(transformation, name)

  @functools.cache
  def descends() -> bool:
    # A few small updates: once, and not for who only asks for shapes. On a
    # thread, which is outside of every trace and mesh of this one.
    with futures.ThreadPoolExecutor(1) as thread:
      return thread.submit(_require_row_wise, transformation, name).result()

  def init(table: Float[Array, "R d"]) -> optax.OptState:
    if not isinstance(table, jax.core.Tracer):
      descends()
    return transformation.init(table.astype(jnp.float32))

  def update(
    table: Float[Array, "R d"],
    state: optax.OptState,
    gradients: RowGradients,
    learning_rate: Float[Array, ""] | float | None = None,
    *,
    axes: Sequence[str] = (),
  ) -> tuple[Float[Array, "R d"], optax.OptState]:
    del axes  # no row looks at another
    _require_rate(learning_rate, descends())
    ids, values = gradients.row_ids, squarable(gradients.values)
    rows = gather_rows(table, ids).astype(jnp.float32)
    of_rows = jax.tree.map(
      lambda x: gather_rows(x, ids) if x.ndim else x, state
    )
    change, of_rows = transformation.update(values, of_rows, rows)
    rows = _moved(rows, change, learning_rate)
    state = jax.tree.map(
      lambda x, new: scatter_rows(x, ids, new) if x.ndim else new,
      state,
      of_rows,
    )
    return scatter_rows(table, ids, rows), state

  return RowOptimizer(init, update)


def dense(transformation: optax.GradientTransformation) -> RowOptimizer:
  """The same transformation over the whole table: every step costs R.

  The oracle of `row_sparse`, and what plain optax would do with the table as
  a parameter.

  Args:
    transformation: as `row_sparse` takes it; it may couple rows.
  """

  def init(table):
    # optax gives the moments the table's dtype, if that is narrower.
    return transformation.init(table.astype(jnp.float32))

  def update(table, state, gradients, learning_rate=None, *, axes=()):
    del axes  # the whole table is here
    rows = table.astype(jnp.float32)
    gradient = squarable(dense_gradient(table, gradients))
    change, state = transformation.update(gradient, state, rows)
    return _moved(rows, change, learning_rate).astype(table.dtype), state

  return RowOptimizer(init, update)


def _moved(rows, change, learning_rate):
  if learning_rate is None:
    return rows + change
  return rows - learning_rate * change


def _require_rate(learning_rate: Any, descends: bool) -> None:
  if descends:
    valid = "None: the transformation has a learning rate of its own"
    require(learning_rate is None, "learning_rate", learning_rate, valid)
  else:
    valid = "a number: the transformation has no learning rate of its own"
    require(learning_rate is not None, "learning_rate", None, valid)


# A prime number of rows and another of columns: shapes tell them apart.
_PROBE_SHAPE = (5, 3)
#: Rows that are transformed once among all of them and once by themselves.
_PROBE_ROWS = np.array([1, 3])
#: Steps of the probe, by the size of their gradients: a limit on a norm shows.
_PROBE_SCALES = (1.0, 1e3, 1e-3)


def _require_state_of_rows(
  transformation: optax.GradientTransformation, name: str
) -> None:
  """Refuses a state that cannot be gathered by rows; from shapes alone."""
  table = jax.ShapeDtypeStruct(_PROBE_SHAPE, jnp.float32)
  for leaf in jax.tree.leaves(jax.eval_shape(transformation.init, table)):
    ok = leaf.ndim == 0 or leaf.shape[0] == _PROBE_SHAPE[0]
    valid = "arrays with one entry a row, or scalars, in its state"
    found = f"state of shape {leaf.shape} for a table of {_PROBE_SHAPE}"
    require(ok, name, found, valid)


def _require_row_wise(
  transformation: optax.GradientTransformation, name: str
) -> bool:
  """Tries a transformation on a small table; see `row_sparse`.

  Returns:
    Whether its updates descend by themselves: they have the sign of a step and
    not that of the gradient.
  """
  rng = np.random.default_rng(0)
  table = rng.normal(size=_PROBE_SHAPE).astype(np.float32)
  gradients = np.abs(rng.normal(size=_PROBE_SHAPE)).astype(np.float32) + 0.1
  rows = _PROBE_ROWS
  state = transformation.init(jnp.asarray(table))
  few = jax.tree.map(lambda x: x[rows] if x.ndim else x, state)
  descends = None
  for scale in _PROBE_SCALES:
    values = jnp.asarray(gradients * scale)
    change, state = transformation.update(values, state, jnp.asarray(table))
    of_few, few = transformation.update(
      values[rows], few, jnp.asarray(table[rows])
    )
    if descends is None:
      descends = bool(jnp.sum(change) < 0)
    among_all = (
      change[rows],
      jax.tree.map(lambda x: x[rows] if x.ndim else x, state),
    )
    same = jax.tree.map(
      lambda x, y: np.allclose(_plain(x), _plain(y), rtol=1e-5, atol=1e-30),
      among_all,
      (of_few, few),
    )
    if not all(jax.tree.leaves(same)):
      valid = "one that treats each row by itself; dense(tx) takes any"
      raise InputError(name, "couples rows", valid)
  return descends


def _plain(leaf: Array) -> np.ndarray:
  """A leaf's numbers; those of a random key too."""
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  return np.asarray(leaf)
