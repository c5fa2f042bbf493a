"""Retrieval: canonical ids to the rows of every Engram layer, before the model.

  row_ids_l = hash_l(canonical)         [B, L, K]     (Eq. 1)
  rows_l    = table_l[row_ids_l]        [B, L, K, d]

Nothing here knows a hidden state, so all layers' rows are found at once, and
`read_rows` is the only place that says where rows come from.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from engram_jax.errors import require
from engram_jax.memory.hashing import NgramHash
from engram_jax.memory.table import lookup
from engram_jax.types import Breaks, CanonicalIds, History, RowIds, Rows

#: One table per Engram layer; each has its own number of rows.
Tables = Mapping[int, Float[Array, "_R d"]]


class Retrieval(NamedTuple):
  """What `retrieve` returns, by Engram layer.

  Attributes:
    rows: [B, L, K, d] in the table's dtype.
    row_ids: int32 [B, L, K].
  """

  rows: dict[int, Rows]
  row_ids: dict[int, RowIds]


def retrieve(
  tables: Tables,
  hashing: NgramHash,
  canonical: CanonicalIds,
  *,
  history: History | None = None,
  breaks: Breaks | None = None,
) -> Retrieval:
  """The rows that each position reads, and where they stand.

  Args:
    tables: [R, d] per Engram layer; R may exceed the hash's rows (padding).
    hashing: the model's hash, constants only.
    canonical: int32 [B, L]; a negative id is a position without text.
    history: int32 [B, N-1], the canonical ids before; None at the start.
    breaks: [B, L] of `Break`.

  Raises:
    InputError: tables of other layers than the hash's or with fewer rows;
      what `NgramHash.row_ids` refuses.
  """
  require_tables(tables, hashing)
  row_ids = hashing.hash(canonical, history=history, breaks=breaks)
  return Retrieval(read_rows(tables, row_ids), row_ids)


def require_tables(tables: Tables, hashing: NgramHash) -> None:
  """Refuses tables of other layers than the hash's, or with fewer rows."""
  given, expected = sorted(tables), sorted(hashing.layers)
  require(given == expected, "tables", given, f"tables of layers {expected}")
  for layer, num_rows in hashing.num_rows.items():
    # The lookup promises that ids are in bounds; this makes it true.
    found = tables[layer].shape[0]
    require(
      found >= num_rows,
      f"tables[{layer}].shape[0]",
      found,
      f"at least the hash's {num_rows} rows",
    )


def read_rows(tables: Tables, row_ids: Mapping[int, RowIds]) -> dict[int, Rows]:
  """Looks up the rows [B, L, K, d] of every layer in `row_ids`."""
  return {layer: lookup(tables[layer], ids) for layer, ids in row_ids.items()}


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
  return {
    layer: ids.reshape(-1, ids.shape[-1])[source].reshape(ids.shape)
    for layer, ids in row_ids.items()
  }
