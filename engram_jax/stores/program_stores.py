"""Stores that a compiled program reads: tables on the device or pinned.

  TableStore     numbers, in the device's memory: the tables as they are trained
  DeviceStore    packed, in the device's memory
  PinnedStore    packed, in pinned host memory

They are pytrees: a jitted function takes one like any argument.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from engram_jax.errors import (
  InputError,
  first_line,
  require,
  require_in_range,
)
from engram_jax.memory.table import lookup
from engram_jax.stores.pinned import gather_on_host, pin, pinned_format
from engram_jax.stores.quantization import RowFormat
from engram_jax.stores.store import (
  Buffers,
  CountingStore,
  PackedRows,
  PackedTables,
  RowIdsByLayer,
  require_layers,
  require_packed_tables,
)


class ProgramStore(CountingStore):
  """Tables that a compiled program reads, a row for each id.

  A pytree of its tables: a jitted function takes it as an argument.

  Args:
    tables: per layer, where they are to stay.
    row_format: format of the rows.
  """

  def __init__(self, tables: Mapping[int, Array], row_format: RowFormat):
    for layer, table in tables.items():
      # Programs have 32-bit ids.
      valid = "less than 2**31; HostStore and FileStore take more"
      require(len(table) < 2**31, f"rows of layer {layer}", len(table), valid)
    super().__init__(row_format, {i: len(x) for i, x in tables.items()})
    self.tables = dict(tables)

  def __init_subclass__(cls, **options: Any):
    super().__init_subclass__(**options)
    jax.tree_util.register_pytree_node(
      cls,
      lambda store: ((store.tables,), (store.row_format, store.layers)),
      cls._with_tables,
    )

  @classmethod
  def _with_tables(cls, about: Any, children: Any) -> "ProgramStore":
    # Leaves may be anything: nothing is checked, and nothing is moved.
    store, (row_format, layers) = cls.__new__(cls), about
    (store.tables,) = children
    shapes = {i: getattr(store.tables[i], "shape", (0,)) for i in layers}
    num_rows = {i: shape[0] for i, shape in shapes.items()}
    CountingStore.__init__(store, row_format, num_rows)
    return store

  def gather(self, table: Array, ids: Array) -> Array:
    """Rows of a table, one for each id in bounds.

    Args:
      table: [R, ...], one layer's table.
      ids: integers of any shape, 0 <= id < R.
    """
    return lookup(table, ids)

  def read(
    self, row_ids: RowIdsByLayer, *, buffers: Buffers | None = None
  ) -> PackedRows:
    """See `RowStore`. Also under jit; `buffers` are of no use to it.

    Args:
      row_ids: integers [...] per layer.
      buffers: ignored: the program places its rows itself.
    """
    del buffers
    require_layers(row_ids, self.num_rows)
    for layer, ids in row_ids.items():
      name, rows = f"row_ids[{layer}]", self.num_rows[layer]
      require_in_range(name, ids, low=0, high=rows)
    packed = {
      layer: self.gather(self.tables[layer], jnp.asarray(ids))
      for layer, ids in row_ids.items()
    }
    if not any(isinstance(x, jax.core.Tracer) for x in packed.values()):
      asked = sum(ids.size for ids in row_ids.values())
      self.count(asked, asked)
    return PackedRows(packed, dict.fromkeys(packed))


class TableStore(ProgramStore):
  """Tables of numbers in the device's memory, as they are trained.

  Args:
    tables: [R, d] per layer, float32 or bfloat16; not copied. Under a mesh
      they are spread over its devices.

  Raises:
    InputError: none, or tables of several dtypes or widths.
  """

  def __init__(self, tables: Mapping[int, Array]):
    require(len(tables) >= 1, "tables", "none", "one or more layers")
    first = next(iter(tables.values()))
    valid = "float32 or bfloat16, and one width, in all layers"
    for layer, table in tables.items():
      ok = str(table.dtype) in ("float32", "bfloat16") and table.ndim == 2
      ok = ok and table.shape[1] == first.shape[1]
      ok = ok and table.dtype == first.dtype
      found = f"{table.dtype}{list(table.shape)}"
      require(ok, f"tables[{layer}]", found, valid)
    super().__init__(tables, RowFormat(str(first.dtype), first.shape[1]))


class DeviceStore(ProgramStore):
  """Packed tables in the device's memory.

  Args:
    tables: uint8 [R, n] per layer; those of NumPy are sent to the device.
    row_format: format of the rows.
  """

  def __init__(self, tables: PackedTables, row_format: RowFormat):
    require_packed_tables(tables, row_format)
    super().__init__(jax.device_put(dict(tables)), row_format)


class PinnedStore(ProgramStore):
  """Packed tables in pinned host memory, gathered there by the program.

  Whether a platform compiles this is for it to say: CPU does, and TPU
  (`experiments/benchmarks/pinned_tpu.py`). One row is read to find out.

  Args:
    tables: uint8 [R, n] per layer; copied to `pinned_host` memory.
    row_format: format of the rows.
    device: whose host memory; None for the first.

  Raises:
    InputError: a device without `pinned_host` memory, or that does not gather
      there.
  """

  def __init__(
    self,
    tables: PackedTables,
    row_format: RowFormat,
    *,
    device: jax.Device | None = None,
  ):
    require_packed_tables(tables, row_format)
    device = device or jax.local_devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    valid = "a device with pinned_host memory; HostStore needs none"
    require("pinned_host" in kinds, "device", device, valid)
    layout = pinned_format(device)
    moved = {layer: pin(x, layout) for layer, x in tables.items()}
    super().__init__(moved, row_format)
    try:
      first = next(iter(moved.values()))
      jax.block_until_ready(self.gather(first, jnp.zeros(1, jnp.int32)))
    except Exception as error:  # whatever its compiler says
      valid = (
        "one that gathers on its host; HostStore needs none "
        f"({first_line(error)})"
      )
      raise InputError("device", device, valid) from error

  def gather(self, table: Array, ids: Array) -> Array:
    """See `ProgramStore`; on the host.

    Args:
      table: uint8 [R, n] in pinned host memory.
      ids: integers of any shape, 0 <= id < R; on the device.
    """
    return gather_on_host(table, ids)
