"""One layer's table: all its heads stacked in one array [R, d], and its reads.

Row `head_offsets[k] + z` is row z of head k (Eq. 1's E_{n,k}), so that one
gather serves all columns. The table is no parameter of the model: a training
step looks its rows up first and differentiates with respect to *them*.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from engram_jax import sharding
from engram_jax.errors import require, require_float32, require_in_range


def init_table(
  key: PRNGKeyArray | Array,
  num_rows: int,
  width: int,
  *,
  std: float,
  dtype: DTypeLike = jnp.float32,
  shards: int = 1,
) -> Float[Array, "R d"]:
  """A new table of independent N(0, std^2) entries.

  The paper gives no scale; DeepSeek's demo inherits PyTorch's std 1. What the
  scale decides is small and measured in BUILD_NOTES.md ("Table
  initialisation"): the key passes an RMSNorm, so the gate does not feel it;
  the value does, and with it how loud the untrained memory speaks, and how
  many Adam steps a row needs to become something else than its start.

  Args:
    key: a JAX random key.
    num_rows: R; `NgramHash.num_rows[layer]`.
    width: d.
    std: standard deviation; 0 makes an all-zero table, which is mute until
      trained.
    dtype: dtype of the entries.
    shards: devices that share the table; see `sharding.padded_rows`. Jit this
      with `out_shardings`, and each makes its own rows only.

  Returns:
    [num_rows, width], and rows of zeros to a multiple of `shards`. The rows do
    not depend on `shards`.

  Raises:
    InputError: a size below 1, or a std that is negative or leaves float32.
  """
  require(num_rows >= 1, "num_rows", num_rows, "an integer >= 1")
  require(width >= 1, "width", width, "an integer >= 1")
  require_float32("std", std)
  require(std >= 0, "std", std, "a number >= 0")
  require(shards >= 1, "shards", shards, "an integer >= 1")
  shape = (sharding.padded_rows(num_rows, shards), width)
  if std == 0:
    return jnp.zeros(shape, dtype)
  # JAX's generator counts entries: more rows at the end change none before.
  table = std * jax.random.normal(key, shape, dtype)
  if shape[0] == num_rows:
    return table
  return jnp.where(jnp.arange(shape[0])[:, None] < num_rows, table, 0)


def init_tables(
  key: PRNGKeyArray | Array,
  num_rows: Mapping[int, int],
  width: int,
  *,
  std: float,
) -> dict[int, Float[Array, "_R d"]]:
  """New tables of all Engram layers; under a mesh each device makes its own.

  Args:
    key: a JAX random key, also to be traced.
    num_rows: R per Engram layer.
    width: d.
    std: standard deviation.

  Returns:
    float32 [R, d] per layer; under a mesh R is a multiple of the devices.
  """
  mesh = sharding.current_mesh()

  def init(key):
    return {
      layer: sharding.constrain(
        init_table(
          jax.random.fold_in(key, layer),
          rows,
          width,
          std=std,
          shards=sharding.size(mesh),
        ),
        sharding.TABLE,
      )
      for layer, rows in num_rows.items()
    }

  if isinstance(key, jax.core.Tracer):
    return init(key)
  # Compiled, so that no device ever holds a whole table.
  shardings = {} if mesh is None else {"out_shardings": sharding.TABLE}
  return jax.jit(init, **shardings)(key)


def lookup(
  table: Shaped[Array, "R d"], row_ids: Int[Array, "*S"]
) -> Shaped[Array, "*S d"]:
  """Reads rows: `table[row_ids]`.

  Args:
    table: [R, d], numbers or the bytes of packed rows.
    row_ids: int32 [...], usually [B, L, K] from `NgramHash.row_ids`.

  Returns:
    [..., d] in the table's dtype.

  Raises:
    InputError: a row id outside the table (outside jit; inside, see
      `errors.check_in_range`).
  """
  require_in_range("row_ids", row_ids, low=0, high=table.shape[0])
  out = None
  if sharding.is_explicit(sharding.current_mesh()):
    # A gather is not told its sharding by its ids.
    spec = jax.typeof(row_ids).sharding.spec
    out = jax.sharding.PartitionSpec(*spec, None)
  # Ids of a hash are in bounds by construction: no clamp, no fill.
  return table.at[row_ids].get(mode="promise_in_bounds", out_sharding=out)
