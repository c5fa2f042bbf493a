"""Rows of tables that are spread over devices: asked for, sent, and paid back.

Device o of n owns rows [o S, (o + 1) S) of each table, R = n S with padding.
`lookup` brings each device the rows of its tokens; `reduce_row_gradients` sums
the gradients of these rows at their owners. Both are for all Engram layers at
once, and no collective carries anything of a table's size.

exchange, for many ids:
  1  each device drops its duplicates: n-grams are Zipfian, about half are
  2  it lays the rest out by owner, [n, C], and all_to_all sends the ids
  3  owners read the rows and all_to_all sends them back
  gradients: summed over duplicates, all_to_all, summed again at the owner

gather, for few ids (a decoding step), where sorting costs more than sending:
  all_gather of the ids, each device reads those that it owns, reduce-scatter

C is a capacity: shapes are fixed. `Plan.needed` says what would have been
enough; a caller with less than that must not use the rows, but come again with
more (`training.step` does). Without a capacity it cannot happen: `lookup`
takes `gather` then.

Axes: n devices, S rows of a shard, M ids of one device, C capacity.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from engram_jax import sharding
from engram_jax.errors import InputError, require
from engram_jax.memory.row_sparse import (
  RowGradients,
  RowOptimizer,
  sum_duplicates,
)
from engram_jax.types import RowIds, Rows

STRATEGIES = ("exchange", "gather")
#: Up to about so many ids a device, `gather` and its gradients take less time
#: than `exchange` (`experiments/results/sharded_lookup.json`).
GATHER_AT_MOST = 128


class Plan(NamedTuple):
  """Where rows were read, so that gradients find the way back.

  Attributes:
    owned: per layer int32 [n * n * C] (exchange) or [n * n * M] (gather), laid
      out by owner: the row of its shard that each arriving entry is about; S
      where there is none.
    slots: per layer int32, shaped as the ids: which entry a token's row came
      in. None with `gather`.
    needed: int32, most distinct rows that one device asks of another: a
      capacity that would have been enough.
  """

  owned: dict[int, Int[Array, "_"]]
  slots: dict[int, RowIds] | None
  needed: Int[Array, ""]

  @property
  def capacity(self) -> int | None:
    """C, where a batch may need more; None where every batch fits.

    To be asked for under the mesh of the lookup.
    """
    if self.slots is None:
      return None
    layer = next(iter(self.owned))
    devices = sharding.size(_require_mesh())
    capacity = self.owned[layer].size // devices**2
    most = ids_per_device(self.slots, devices)
    return capacity if capacity < most else None


def choose_strategy(ids_per_device: int) -> str:
  """The faster strategy for so many ids of one layer; see GATHER_AT_MOST."""
  return "gather" if ids_per_device <= GATHER_AT_MOST else "exchange"


def ids_per_device(row_ids: Mapping[int, Any], devices: int) -> int:
  """M: ids of one layer on one device; as a capacity, more than any needs.

  Args:
    row_ids: ids per layer, as many in each.
    devices: number of devices that share them.
  """
  (count,) = {ids.size for ids in row_ids.values()}
  return count // devices


def mean_capacity(ids_per_device: int, devices: int, *, factor: float) -> int:
  """`factor` times the mean number of ids that an owner is asked for.

  Args:
    ids_per_device: M, number of ids of one layer on one device.
    devices: number of devices that own rows.
    factor: room over the mean.
  """
  require(factor > 0, "capacity factor", factor, "a number above 0")
  most = ids_per_device
  return min(most, max(1, math.ceil(factor * most / devices)))


def lookup(
  tables: Mapping[int, Array],
  row_ids: Mapping[int, RowIds],
  *,
  strategy: str | None = None,
  capacity: int | None = None,
) -> tuple[dict[int, Rows], Plan]:
  """Reads the rows of all layers, from whichever device owns them.

  To be traced for a mesh (`sharding.use`, or `jax.set_mesh`). Differentiable
  with respect to the tables; training does not do that, it differentiates with
  respect to the rows and calls `reduce_row_gradients`.

  Args:
    tables: per layer [R, d], R a multiple of the number of devices, all of the
      same d and dtype.
    row_ids: per layer int32 [B, L, K]; B divides by the batch axes of the mesh
      and L by its tensor axis.
    strategy: one of `STRATEGIES`; None for `choose_strategy`, or for `gather`
      where no capacity is given.
    capacity: C, of `exchange` alone; None for M, that of all ids.

  Returns:
    Per layer [B, L, K, d], and the plan. Rows beyond the capacity are zeros:
    nothing may be done with them if `needed` exceeds it.

  Raises:
    InputError: no mesh; layers, shapes or a strategy that do not fit.
  """
  mesh = _require_mesh()
  devices = sharding.size(mesh)
  _check(tables, row_ids, mesh)
  ids = ids_per_device(row_ids, devices)
  if strategy is None:
    # An exchange with room for everything sends no less, and sorts besides.
    strategy = "gather" if capacity is None else choose_strategy(ids)
  valid = f"one of {', '.join(STRATEGIES)}"
  require(strategy in STRATEGIES, "strategy", strategy, valid)
  capacity = ids if capacity is None else capacity
  require(capacity >= 1, "capacity", capacity, "an integer >= 1")
  tables = {i: sharding.constrain(t, sharding.TABLE) for i, t in tables.items()}
  row_ids = {
    i: sharding.constrain(ids, sharding.TOKENS_BY_DEVICE)
    for i, ids in row_ids.items()
  }
  if strategy == "gather":
    plan = Plan(sharding.TABLE, None, P())
    body = _gather
  else:
    plan = Plan(sharding.TABLE, sharding.TOKENS_BY_DEVICE, P())

    def body(tables, row_ids):
      return _exchange(tables, row_ids, devices=devices, capacity=capacity)

  rows, plan = jax.shard_map(
    body,
    in_specs=(sharding.TABLE, sharding.TOKENS_BY_DEVICE),
    out_specs=(sharding.TOKENS_BY_DEVICE, plan),
  )(tables, row_ids)
  # The devices of a tensor group compute with the same tokens.
  spec = sharding.TOKENS
  return {i: sharding.constrain(r, spec) for i, r in rows.items()}, plan


def reduce_row_gradients(
  plan: Plan, gradients: Mapping[int, Rows], *, num_rows: Mapping[int, int]
) -> dict[int, RowGradients]:
  """Gradients with respect to rows of a `lookup`, summed at the rows' owners.

  Args:
    plan: the plan that `lookup` returned.
    gradients: per layer [B, L, K, d].
    num_rows: per layer R, rows of the table, padding included.

  Returns:
    Per layer `RowGradients` laid out by owner, whose `row_ids` count within the
    owner's shard: for `update` alone. Their values are those of the dense
    gradient, each row once.
  """
  mesh = _require_mesh()
  devices = sharding.size(mesh)
  gradients = {
    i: sharding.constrain(g, sharding.TOKENS_BY_DEVICE)
    for i, g in gradients.items()
  }
  shard = {i: num_rows[i] // devices for i in gradients}

  def exchange(owned, slots, gradients):
    sums = {}
    for layer, values in gradients.items():
      values = values.reshape(-1, values.shape[-1]).astype(jnp.float32)
      sums[layer] = jax.ops.segment_sum(
        values, slots[layer].reshape(-1), num_segments=owned[layer].size
      )
    return _summed(_swap(sums, devices), owned, shard)

  def gather(owned, gradients):
    everyone = {
      layer: lax.all_gather(
        values.reshape(-1, values.shape[-1]), sharding.AXES, tiled=True
      )
      for layer, values in gradients.items()
    }
    return _summed(everyone, owned, shard)

  table, lookups = sharding.TABLE, sharding.TOKENS_BY_DEVICE
  if plan.slots is None:
    body, specs = gather, (table, lookups)
    arguments = (plan.owned, gradients)
  else:
    body, specs = exchange, (table, lookups, lookups)
    arguments = (plan.owned, plan.slots, gradients)
  return jax.shard_map(body, in_specs=specs, out_specs=table)(*arguments)


def update(
  optimizer: RowOptimizer,
  table: Array,
  state: Any,
  gradients: RowGradients,
  learning_rate: Any,
) -> tuple[Array, Any]:
  """`optimizer.update`, each device on its own rows.

  Nothing is sent but what an optimizer takes of all rows together (`sinkhorn`:
  sums of d numbers).

  Args:
    optimizer: any `RowOptimizer`.
    table: [R, d], spread over the mesh.
    state: the optimizer's; arrays of R entries are spread as the table.
    gradients: from `reduce_row_gradients`.
    learning_rate: a scalar.
  """
  _require_mesh()
  rows = table.shape[0]

  state_specs = jax.tree.map(lambda x: sharding.table_spec(x, rows), state)

  def body(table, state, gradients, learning_rate):
    return optimizer.update(
      table, state, gradients, learning_rate, axes=sharding.AXES
    )

  return jax.shard_map(
    body,
    in_specs=(sharding.TABLE, state_specs, sharding.TABLE, P()),
    out_specs=(sharding.TABLE, state_specs),
  )(table, state, gradients, jnp.asarray(learning_rate, jnp.float32))


# --- on one device, inside shard_map ---


def _exchange(tables, row_ids, *, devices, capacity):
  """The body of `lookup`: local shards [S, d] and ids in, rows and plan out."""
  owned, slots, needed = {}, {}, []
  for layer, ids in row_ids.items():
    requests, slots[layer], most = _requests(
      ids, shard=tables[layer].shape[0], devices=devices, capacity=capacity
    )
    owned[layer] = requests
    needed.append(most)
  owned = _swap(owned, devices)
  found = _swap(
    {
      layer: table.at[owned[layer]].get(mode="fill", fill_value=0)
      for layer, table in tables.items()
    },
    devices,
  )
  rows = {
    layer: found[layer].at[slots[layer]].get(mode="fill", fill_value=0)
    for layer in row_ids
  }
  most = lax.pmax(jnp.max(jnp.stack(needed)), sharding.AXES)
  return rows, Plan(owned, slots, most)


def _requests(ids, *, shard, devices, capacity):
  """Distinct ids by owner: [n * C] rows of shards, each id's slot, and need."""
  flat = ids.reshape(-1)
  order = jnp.argsort(flat, stable=True)
  ascending = flat[order]
  first = jnp.ones(1, bool)
  is_first = jnp.concatenate([first, ascending[1:] != ascending[:-1]])
  owner, local = ascending // shard, ascending % shard
  count = jax.ops.segment_sum(
    is_first.astype(jnp.int32),
    owner,
    num_segments=devices,
    indices_are_sorted=True,
  )
  # Owners ascend with the ids, so each one's distinct rows stand together.
  rank = jnp.cumsum(is_first) - 1 - (jnp.cumsum(count) - count)[owner]
  nowhere = devices * capacity
  slot = jnp.where(rank < capacity, owner * capacity + rank, nowhere)
  requests = jnp.full(nowhere, shard, jnp.int32)
  requests = requests.at[slot].set(local, mode="drop")
  slots = jnp.zeros_like(flat).at[order].set(slot, unique_indices=True)
  return requests, slots.reshape(ids.shape), jnp.max(count)


def _swap(parts, devices):
  """One all_to_all of all layers' [n * C, ...]: part o goes to device o."""
  joined, ends = [], []
  for part in parts.values():
    joined.append(part.reshape(devices, -1, *part.shape[1:]))
    ends.append(joined[-1].shape[1] + (ends[-1] if ends else 0))
  swapped = lax.all_to_all(
    jnp.concatenate(joined, axis=1), sharding.AXES, 0, 0, tiled=True
  )
  pieces = jnp.split(swapped, ends[:-1], axis=1)
  return {
    layer: piece.reshape(part.shape)
    for (layer, part), piece in zip(parts.items(), pieces, strict=True)
  }


def _gather(tables, row_ids):
  """The body of `lookup`: everyone learns all ids, and each answers its own."""
  me = lax.axis_index(sharding.AXES)
  owned, rows = {}, {}
  for layer, ids in row_ids.items():
    shard, width = tables[layer].shape
    everyone = lax.all_gather(ids.reshape(-1), sharding.AXES, tiled=True)
    mine = everyone // shard == me
    owned[layer] = jnp.where(mine, everyone % shard, shard)
    found = tables[layer].at[owned[layer]].get(mode="fill", fill_value=0)
    # One term of the sum is a row, the others are zeros: it is exact.
    found = lax.psum_scatter(found, sharding.AXES, tiled=True)
    rows[layer] = found.reshape(*ids.shape, width)
  return rows, Plan(owned, None, jnp.zeros((), jnp.int32))


def _summed(values, owned, shard):
  """Gradients that arrived at their owner, each row once."""
  sums = {}
  for layer, ids in owned.items():
    # What is not about a row of this shard has id S, and counts for nothing.
    here = jnp.where((ids < shard[layer])[:, None], values[layer], 0)
    sums[layer] = sum_duplicates(ids, here, num_rows=shard[layer])
  return sums


# --- checks ---


def _require_mesh():
  mesh = sharding.current_mesh()
  if mesh is None:
    valid = f"one of the axes {', '.join(sharding.AXES)}, by jax.set_mesh"
    raise InputError("mesh", "none", valid)
  return mesh


def _check(tables, row_ids, mesh):
  given, expected = sorted(tables), sorted(row_ids)
  require(given == expected, "tables", given, f"tables of layers {expected}")
  devices = sharding.size(mesh)
  batch = sharding.size(mesh, *sharding.BATCH)
  tensor = sharding.size(mesh, sharding.TENSOR)
  for layer, table in tables.items():
    ok = table.shape[0] % devices == 0
    valid = f"a multiple of the {devices} devices: see sharding.padded_rows"
    require(ok, f"tables[{layer}].shape[0]", table.shape[0], valid)
    ids = row_ids[layer]
    ok = ids.ndim == 3 and ids.shape[0] % batch == 0 == ids.shape[1] % tensor
    valid = f"[B, L, K], B a multiple of {batch} and L of {tensor}"
    require(ok, f"row_ids[{layer}].shape", ids.shape, valid)
