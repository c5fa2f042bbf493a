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

import threading
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped, UInt8

from engram_jax.errors import require
from engram_jax.stores.quantization import RowFormat, unpack_rows

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
    """uint8 [rows, size] of any content, the same memory at every call.

    Args:
      layer: the Engram layer that the memory is for.
      rows: number of rows.
      size: bytes of one row.
    """
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
    row_format: format of every row.
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

  Args:
    rows: packed rows from a store's `read`.
    row_format: the store's format.
    dtype: dtype of the result.
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
    rows: packed rows from a store that reads on the host.
    device: a device or sharding; None for JAX's default.

  Returns:
    The same as JAX arrays of memory of their own.
  """
  # On CPU what device_put returns may lie in NumPy's memory, even if it is told
  # `may_alias=False`; a copy on the device does not.
  copies = jax.tree.map(jnp.copy, jax.device_put(rows, device))
  return jax.block_until_ready(copies)


def require_layers(row_ids: RowIdsByLayer, num_rows: Mapping[int, int]) -> None:
  """Refuses ids of layers that a store does not have, or that are none.

  Args:
    row_ids: integers [...] per layer.
    num_rows: R per layer of the store.
  """
  valid = f"row ids of the layers {list(num_rows)}"
  ok = set(row_ids) <= set(num_rows)
  require(ok, "row_ids", f"layers {list(row_ids)}", valid)
  for layer, ids in row_ids.items():
    is_integer = np.dtype(ids.dtype).kind in "iu"
    require(is_integer, f"row_ids[{layer}]", ids.dtype, "integers")


def require_rows_of(layer: int, ascending: np.ndarray, rows: int) -> None:
  """Refuses ids [U] in ascending order that are not all 0 <= id < rows.

  Args:
    layer: the Engram layer, for the error line.
    ascending: distinct ids [U], smallest first.
    rows: R, number of the layer's rows.
  """
  for wrong in (ascending[:1], ascending[-1:]):
    ok = ((wrong >= 0) & (wrong < rows)).all()
    require(ok, f"row_ids[{layer}]", wrong, f"0 <= id < {rows}")


class CountingStore:
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

  def count(self, asked: int, read: int) -> None:
    """Adds one call of `read` to the statistics.

    Args:
      asked: number of ids in the call.
      read: number of rows read for them.
    """
    new = (1, asked, read, read * self.row_format.bytes_per_row)
    with self._lock:
      sums = (a + b for a, b in zip(self._statistics, new))
      self._statistics = ReadStatistics(*sums)


def require_packed_tables(tables: PackedTables, row_format: RowFormat) -> None:
  """Refuses tables that are not packed in this format.

  Args:
    tables: uint8 [R, n] per layer.
    row_format: format that the rows are to have.

  Raises:
    InputError: no table, or one of another dtype or shape.
  """
  require(len(tables) >= 1, "tables", "none", "one or more layers")
  for layer, table in tables.items():
    ok = table.dtype == np.uint8 and table.ndim == 2 and len(table) >= 1
    ok = ok and table.shape[1] == row_format.bytes_per_row
    found = f"{table.dtype}{list(table.shape)}"
    valid = f"uint8[R, {row_format.bytes_per_row}] with R >= 1"
    require(ok, f"tables[{layer}]", found, valid)
