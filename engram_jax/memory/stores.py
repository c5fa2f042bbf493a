"""Row stores: where packed rows live, behind one way of reading them.

                 home                     reads by
  TableStore     the device's memory      a gather in the program
  DeviceStore    the device's memory      a gather in the program
  PinnedStore    pinned host memory       a gather on the host, in the program
  HostStore      host memory (NumPy)      distinct ids, one copy each
  FileStore      a row file               distinct ids, one page each

A read takes the row ids of *all* layers, known from the tokens alone, and
returns packed bytes: these travel to the device, where `unpack` makes numbers
of them. The rows are those of `table.lookup`, bit for bit, at equal dtype.
`TableStore` has numbers to begin with: tables as they were trained.

N-grams are Zipfian, so a batch asks for many rows twice or more. On the host
they are made distinct by sorting, and come as `packed[inverse]`. The number of
distinct rows changes from batch to batch; it is rounded up to an eighth of the
rows asked for, so that a batch shape has at most eight compiled programs.

Axes besides those of `types.py`:

  P  distinct rows, rounded up  n  bytes of a packed row
"""

import math
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped, UInt8

from engram_jax.errors import (
  InputError,
  first_line,
  require,
  require_in_range,
)
from engram_jax.memory.pinned import gather_on_host, pin, pinned_format
from engram_jax.memory.quantization import RowFormat, unpack_rows
from engram_jax.memory.row_files import RowFile
from engram_jax.memory.table import lookup

RowIdsByLayer = Mapping[int, Int[Array | np.ndarray, "..."]]
PackedTables = Mapping[int, UInt8[Array | np.ndarray, "_R n"]]


class PackedRows(NamedTuple):
  """What a store returns, by layer; a pytree.

  Attributes:
    packed: uint8 [P, n], distinct rows by ascending id, then zeros; or, where
      `inverse` is None, [..., n], a row for each id. Of a `TableStore`, numbers
      [..., d].
    inverse: int32 [...], which of them each id names.
  """

  packed: dict[int, Shaped[Array | np.ndarray, "..."]]
  inverse: dict[int, Int[Array | np.ndarray, "..."] | None]


class ReadStatistics(NamedTuple):
  """What a store has read so far.

  Attributes:
    reads: calls of `read`.
    rows_asked: row ids in them, over all layers.
    rows_read: rows that were fetched for these.
    bytes_read: their packed bytes. (A row file is read in pages: each row not
      in the page cache costs 4096 bytes.)
  """

  reads: int = 0
  rows_asked: int = 0
  rows_read: int = 0
  bytes_read: int = 0


class Buffers:
  """Memory that reads of one thread reuse; it grows to the largest.

  Arrays of a read with these buffers are overwritten by the next one with
  them: `to_device` first, which waits until the device has its own copy.
  """

  def __init__(self):
    self._arrays: dict[int, np.ndarray] = {}

  def take(self, layer: int, rows: int, size: int) -> np.ndarray:
    """uint8 [rows, size] of any content, the same memory at every call."""
    array = self._arrays.get(layer)
    if array is None or array.size < rows * size:
      array = self._arrays[layer] = np.empty(rows * size, np.uint8)
    return array[: rows * size].reshape(rows, size)


class OwnBuffers(threading.local):
  """`Buffers` of whichever thread asks for `.buffers`."""

  def __init__(self):
    self.buffers = Buffers()


@runtime_checkable
class RowStore(Protocol):
  """Packed rows of every Engram layer of a model.

  Attributes:
    row_format: of every row.
    num_rows: R per layer.
    statistics: what was read so far; of reads inside a compiled program
      nothing is counted.
  """

  row_format: RowFormat
  num_rows: Mapping[int, int]

  @property
  def statistics(self) -> ReadStatistics: ...

  def read(
    self, row_ids: RowIdsByLayer, *, buffers: Buffers | None = None
  ) -> PackedRows:
    """Reads rows of all layers at once. Threads may call it at once.

    Args:
      row_ids: integers [...] per layer, usually [B, L, K] of `NgramHash`.
      buffers: where the rows may be put, by stores that read on the host;
        None for fresh memory.

    Raises:
      InputError: a layer that the store does not have, or an id outside
        0 <= id < R (where ids are known, that is, outside jit).
    """
    ...


def unpack(
  rows: PackedRows, row_format: RowFormat, dtype: DTypeLike = jnp.float32
) -> dict[int, Float[Array, "..."]]:
  """The rows as numbers, [..., d] of `dtype` per layer; for use under jit.

  The bytes are gathered first and made numbers in the same pass: fewer bytes
  move than if it were the other way round.
  """
  found = {}
  for layer, packed in rows.packed.items():
    packed, inverse = jnp.asarray(packed), rows.inverse[layer]
    if inverse is not None:
      packed = packed.at[inverse].get(mode="promise_in_bounds")
    if packed.dtype == jnp.uint8:
      found[layer] = unpack_rows(packed, row_format, dtype)
    else:  # numbers, of a `TableStore`
      found[layer] = packed.astype(dtype)
  return found


def to_device(rows: PackedRows, device: Any = None) -> PackedRows:
  """Copies what a store read to the device, and waits until it is there.

  Args:
    rows: of a store that reads on the host.
    device: a device or sharding; None for JAX's default.

  Returns:
    The same as JAX arrays of memory of their own.
  """
  # On CPU what device_put returns may lie in NumPy's memory, even if it is told
  # `may_alias=False`; a copy on the device does not.
  copies = jax.tree.map(jnp.copy, jax.device_put(rows, device))
  return jax.block_until_ready(copies)


def require_layers(row_ids: RowIdsByLayer, num_rows: Mapping[int, int]) -> None:
  """Refuses ids of layers that a store does not have, or that are none."""
  valid = f"row ids of the layers {list(num_rows)}"
  ok = set(row_ids) <= set(num_rows)
  require(ok, "row_ids", f"layers {list(row_ids)}", valid)
  for layer, ids in row_ids.items():
    is_integer = np.dtype(ids.dtype).kind in "iu"
    require(is_integer, f"row_ids[{layer}]", ids.dtype, "integers")


def require_rows_of(layer: int, ascending: np.ndarray, rows: int) -> None:
  """Refuses ids [U] in ascending order that are not all 0 <= id < rows."""
  for wrong in (ascending[:1], ascending[-1:]):
    ok = ((wrong >= 0) & (wrong < rows)).all()
    require(ok, f"row_ids[{layer}]", wrong, f"0 <= id < {rows}")


class _Counting:
  """`statistics`, from any number of threads."""

  def __init__(self, row_format: RowFormat, num_rows: Mapping[int, int]):
    self.row_format = row_format
    self.num_rows = dict(num_rows)
    self._statistics = ReadStatistics()
    self._lock = threading.Lock()

  @property
  def layers(self) -> tuple[int, ...]:
    return tuple(self.num_rows)

  @property
  def statistics(self) -> ReadStatistics:
    return self._statistics

  def _count(self, asked: int, read: int) -> None:
    new = (1, asked, read, read * self.row_format.bytes_per_row)
    with self._lock:
      sums = (a + b for a, b in zip(self._statistics, new))
      self._statistics = ReadStatistics(*sums)


class ProgramStore(_Counting):
  """Tables that a compiled program reads, a row for each id.

  A pytree of its tables: a jitted function takes it as an argument.

  Args:
    tables: per layer, where they are to stay.
    row_format: of the rows.
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
    _Counting.__init__(store, row_format, num_rows)
    return store

  def gather(self, table: Array, ids: Array) -> Array:
    """Rows of a table, one for each id in bounds."""
    return lookup(table, ids)

  def read(
    self, row_ids: RowIdsByLayer, *, buffers: Buffers | None = None
  ) -> PackedRows:
    """See `RowStore`. Also under jit; `buffers` are of no use to it."""
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
      self._count(asked, asked)
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
    row_format: of the rows.
  """

  def __init__(self, tables: PackedTables, row_format: RowFormat):
    _require_tables(tables, row_format)
    super().__init__(jax.device_put(dict(tables)), row_format)


class PinnedStore(ProgramStore):
  """Packed tables in pinned host memory, gathered there by the program.

  Whether a platform compiles this is for it to say: CPU does, and TPU
  (`experiments/benchmarks/pinned_tpu.py`). One row is read to find out.

  Args:
    tables: uint8 [R, n] per layer; copied to `pinned_host` memory.
    row_format: of the rows.
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
    _require_tables(tables, row_format)
    device = device or jax.local_devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    valid = "a device with pinned_host memory; HostStore needs none"
    require("pinned_host" in kinds, "device", device, valid)
    home = pinned_format(device)
    moved = {layer: pin(x, home) for layer, x in tables.items()}
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
    """See `ProgramStore`; on the host."""
    return gather_on_host(table, ids)


class HostReads(_Counting):
  """What stores that read on the host share: each distinct row is read once.

  Args:
    row_format: of the rows.
    num_rows: R per layer.
  """

  def copy_rows(self, layer: int, ids: np.ndarray, out: np.ndarray) -> None:
    """Copies rows; this is what a store of this kind defines.

    Args:
      layer: one of `num_rows`.
      ids: integers [U], distinct, ascending, in bounds.
      out: uint8 [U, n], to be filled.
    """
    raise NotImplementedError

  def read(
    self, row_ids: RowIdsByLayer, *, buffers: Buffers | None = None
  ) -> PackedRows:
    """See `RowStore`. The arrays are NumPy's."""
    require_layers(row_ids, self.num_rows)
    packed, inverse, asked, read = {}, {}, 0, 0
    buffers = buffers or Buffers()
    for layer, ids in row_ids.items():
      ids = np.asarray(ids)
      distinct, places = np.unique(ids, return_inverse=True)
      require_rows_of(layer, distinct, self.num_rows[layer])
      count = len(distinct)
      # Never 0: an empty array cannot be gathered from.
      eighth = max(1, math.ceil(ids.size / 8))
      padded = max(1, math.ceil(count / eighth)) * eighth
      out = buffers.take(layer, padded, self.row_format.bytes_per_row)
      self.copy_rows(layer, distinct, out[:count])
      out[count:] = 0
      packed[layer] = out
      inverse[layer] = places.reshape(ids.shape).astype(np.int32)
      asked, read = asked + ids.size, read + count
    self._count(asked, read)
    return PackedRows(packed, inverse)


class HostStore(HostReads):
  """Packed tables in host memory.

  Args:
    tables: uint8 [R, n] per layer, C order; not copied.
    row_format: of the rows.
  """

  def __init__(self, tables: Mapping[int, np.ndarray], row_format: RowFormat):
    _require_tables(tables, row_format)
    for layer, table in tables.items():
      # NumPy's take would copy another table whole, at every read.
      valid = "an array in C order"
      ok = table.flags.c_contiguous
      require(ok, f"tables[{layer}]", f"strides {table.strides}", valid)
    super().__init__(row_format, {i: len(x) for i, x in tables.items()})
    self._tables = dict(tables)

  def copy_rows(self, layer: int, ids: np.ndarray, out: np.ndarray) -> None:
    # The ids are in bounds; any mode but this one would buffer `out`.
    np.take(self._tables[layer], ids, axis=0, out=out, mode="clip")


class FileStore(HostReads):
  """Packed rows in a row file. Processes that open one file share its pages.

  Args:
    file: open; its layers, rows and format are the store's.
  """

  def __init__(self, file: RowFile):
    super().__init__(file.header.row_format, file.header.num_rows)
    self.file = file

  def copy_rows(self, layer: int, ids: np.ndarray, out: np.ndarray) -> None:
    self.file.read(layer, ids, out)


def _require_tables(tables: PackedTables, row_format: RowFormat) -> None:
  require(len(tables) >= 1, "tables", "none", "one or more layers")
  for layer, table in tables.items():
    ok = table.dtype == np.uint8 and table.ndim == 2 and len(table) >= 1
    ok = ok and table.shape[1] == row_format.bytes_per_row
    found = f"{table.dtype}{list(table.shape)}"
    valid = f"uint8[R, {row_format.bytes_per_row}] with R >= 1"
    require(ok, f"tables[{layer}]", found, valid)
