"""Stores that are read on the host: each distinct row of a batch once.

HostStore    packed, in host memory (NumPy)
FileStore    packed, in a row file that is mapped into memory
"""

import math
from collections.abc import Mapping

import numpy as np

from engram_jax.errors import require
from engram_jax.stores.quantization import RowFormat
from engram_jax.stores.row_files import RowFile
from engram_jax.stores.store import (
  Buffers,
  CountingStore,
  PackedRows,
  RowIdsByLayer,
  require_layers,
  require_packed_tables,
  require_rows_of,
)


class HostReads(CountingStore):
  """What stores that read on the host share: each distinct row is read once.

  Args:
    row_format: format of the rows.
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
    """See `RowStore`. The arrays are NumPy's.

    Args:
      row_ids: integers [...] per layer.
      buffers: where the rows are put; None for fresh memory.
    """
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
    self.count(asked, read)
    return PackedRows(packed, inverse)


class HostStore(HostReads):
  """Packed tables in host memory.

  Args:
    tables: uint8 [R, n] per layer, C order; not copied.
    row_format: format of the rows.
  """

  def __init__(self, tables: Mapping[int, np.ndarray], row_format: RowFormat):
    require_packed_tables(tables, row_format)
    for layer, table in tables.items():
      # NumPy's take would copy another table whole, at every read.
      valid = "an array in C order"
      ok = table.flags.c_contiguous
      require(ok, f"tables[{layer}]", f"strides {table.strides}", valid)
    super().__init__(row_format, {i: len(x) for i, x in tables.items()})
    self._tables = dict(tables)

  def copy_rows(self, layer: int, ids: np.ndarray, out: np.ndarray) -> None:
    """See `HostReads`.

    Args:
      layer: one of the store's layers.
      ids: integers [U], in bounds.
      out: uint8 [U, n], where the rows are put.
    """
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
    """See `HostReads`.

    Args:
      layer: one of the store's layers.
      ids: integers [U], in bounds.
      out: uint8 [U, n], where the rows are put.
    """
    self.file.read(layer, ids, out)
