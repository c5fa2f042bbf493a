"""Lookup: the rows that a batch reads, and the way back for their gradients.

  rows_l = table_l[row_ids_l]        [B, L, K, d]     (Eq. 1)

`lookup_rows` reads the rows of all Engram layers at once, from the tables of
one device or, under a mesh, from whichever device owns them. A loss is then
differentiated with respect to `Lookup.rows`; `reduce_row_gradients` sums these
gradients over equal rows, where the row lives, and `apply_row_gradients` lets a
row optimizer move the rows. `Memory` puts the three together.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from engram_jax import sharding
from engram_jax.errors import require
from engram_jax.memory import exchange
from engram_jax.memory.row_sparse import (
  RowGradients,
  RowOptimizer,
  sum_duplicates,
)
from engram_jax.memory.table import lookup
from engram_jax.types import RowIds, Rows

#: One table per Engram layer; each has its own number of rows.
Tables = Mapping[int, Float[Array, "_R d"]]


class Lookup(NamedTuple):
  """The rows of a batch by Engram layer, and what is needed to update them.

  Attributes:
    rows: [B, L, K, d] in the table's dtype.
    row_ids: int32 [B, L, K]; int64 where they were hashed on the host.
    plan: plan of the exchange between devices; None without a mesh.
  """

  rows: dict[int, Rows]
  row_ids: dict[int, RowIds | Int[np.ndarray, "B L K"]]
  plan: exchange.Plan | None = None

  @property
  def capacity(self) -> int | None:
    """Distinct rows that one device may ask of another; None for any number."""
    return None if self.plan is None else self.plan.capacity

  @property
  def capacity_needed(self) -> Int[Array, ""] | None:
    """The capacity that this batch takes; None where nothing limits it."""
    return None if self.capacity is None else self.plan.needed

  @property
  def is_complete(self) -> Bool[Array, ""] | bool:
    """Whether the capacity sufficed; if not, some rows are zeros."""
    if self.capacity is None:
      return True
    return self.plan.needed <= self.capacity


def lookup_rows(
  tables: Tables,
  row_ids: Mapping[int, RowIds],
  *,
  strategy: str | None = None,
  capacity: int | None = None,
) -> Lookup:
  """Reads the rows of every layer in `row_ids`.

  Args:
    tables: [R, d] per Engram layer; R may exceed the hash's rows (padding).
      Under a mesh their rows are spread over all its devices.
    row_ids: int32 [B, L, K] per Engram layer.
    strategy: how rows travel between devices, see `exchange.lookup`; None for
      the faster one.
    capacity: distinct rows that one device may ask of another, see
      `exchange.lookup`; None for any number.

  Raises:
    InputError: what `exchange.lookup` refuses.
  """
  if sharding.current_mesh() is None or not row_ids:
    rows = {i: lookup(tables[i], ids) for i, ids in row_ids.items()}
    return Lookup(rows, dict(row_ids))
  rows, plan = exchange.lookup(
    tables, row_ids, strategy=strategy, capacity=capacity
  )
  return Lookup(rows, dict(row_ids), plan)


def reduce_row_gradients(
  found: Lookup, gradients: Mapping[int, Rows], tables: Tables
) -> dict[int, RowGradients]:
  """Each row's gradient once; under a mesh on the device where the row lives.

  Args:
    found: what was looked up.
    gradients: [B, L, K, d] per Engram layer, with respect to `found.rows`.
    tables: those that were read.

  Returns:
    `RowGradients` per Engram layer, for `apply_row_gradients`.

  Raises:
    InputError: gradients of other layers or shapes than the rows.
  """
  given, expected = sorted(gradients), sorted(found.rows)
  valid = f"gradients of layers {expected}"
  require(given == expected, "row gradients", given, valid)
  for layer, values in gradients.items():
    shape = found.rows[layer].shape
    valid = f"shape {shape}, that of the rows"
    name = f"row gradients[{layer}]"
    require(values.shape == shape, name, values.shape, valid)
  num_rows = {layer: tables[layer].shape[0] for layer in gradients}
  if found.plan is not None:
    return exchange.reduce_row_gradients(
      found.plan, gradients, num_rows=num_rows
    )
  return {
    layer: sum_duplicates(
      found.row_ids[layer], values, num_rows=num_rows[layer]
    )
    for layer, values in gradients.items()
  }


def apply_row_gradients(
  row_optimizer: RowOptimizer,
  tables: Tables,
  states: Mapping[int, Any],
  row_gradients: Mapping[int, RowGradients],
  learning_rate: Float[Array, ""] | float | None,
) -> tuple[dict[int, Array], dict[int, Any]]:
  """Tables and optimizer states after one step on the touched rows.

  Args:
    row_optimizer: from `row_sparse`, `dense` or `sinkhorn`.
    tables: [R, d] per Engram layer; to be donated.
    states: the optimizer's, per Engram layer; to be donated.
    row_gradients: from `reduce_row_gradients`.
    learning_rate: see `RowOptimizer`.
  """
  new_tables, new_states = dict(tables), dict(states)
  on_mesh = sharding.current_mesh() is not None
  for layer, gradients in row_gradients.items():
    arguments = (tables[layer], states[layer], gradients, learning_rate)
    if on_mesh:
      new = exchange.update(row_optimizer, *arguments)
    else:
      new = row_optimizer.update(*arguments)
    new_tables[layer], new_states[layer] = new
  return new_tables, new_states


def require_tables(tables: Tables, num_rows: Mapping[int, int]) -> None:
  """Refuses tables of other layers than `num_rows`', or with fewer rows.

  Args:
    tables: [R, d] per layer.
    num_rows: R per layer that the hash needs.
  """
  given, expected = sorted(tables), sorted(num_rows)
  require(given == expected, "tables", given, f"tables of layers {expected}")
  for layer, count in num_rows.items():
    # The lookup promises that ids are in bounds; this makes it true.
    found = tables[layer].shape[0]
    require(
      found >= count,
      f"tables[{layer}].shape[0]",
      found,
      f"at least the hash's {count} rows",
    )


def shuffle_row_ids(
  key: PRNGKeyArray | Array,
  row_ids: Mapping[int, Int[Array | np.ndarray, "B L K"]],
) -> dict[int, Int[Array | np.ndarray, "B L K"]]:
  """Lets each position read what another one should: real rows, but wrong.

  A control for what the memory is worth: the rows keep their statistics and
  lose their place. The B * L positions are put in one random cycle, so that
  none keeps its own; all layers and columns share it.

  Args:
    key: a JAX random key.
    row_ids: int32 [B, L, K] per layer; or NumPy's, of any integers.

  Returns:
    The same at other positions, [B, L, K] per layer.

  Raises:
    InputError: fewer than two positions, which leaves no other one.
  """
  positions = {ids.shape[0] * ids.shape[1] for ids in row_ids.values()}
  valid = "one number of positions B * L >= 2 in all layers"
  ok = len(positions) == 1 and min(positions) >= 2
  require(ok, "row_ids", f"{sorted(positions)} positions", valid)
  order = jax.random.permutation(key, positions.pop())
  source = jnp.zeros_like(order).at[order].set(jnp.roll(order, 1))

  explicit = sharding.is_explicit(sharding.current_mesh())

  def shuffled(ids):
    placed = explicit and not isinstance(ids, np.ndarray)
    if placed:  # a gather is not told its sharding: whole, and then back
      spec = jax.typeof(ids).sharding.spec
      ids = sharding.constrain(ids, sharding.WHOLE)
    found = ids.reshape(-1, ids.shape[-1])[source].reshape(ids.shape)
    return sharding.constrain(found, spec) if placed else found

  return {layer: shuffled(ids) for layer, ids in row_ids.items()}
