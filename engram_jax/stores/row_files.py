"""Row files: the packed rows of a model's Engram layers in one file of ours.

  header    whole pages   magic, length and CRC-32 of a JSON text; that text
  rows      whole pages   layer after layer, each from a new page on
  checksums               CRC-32 of each block of rows, then of this table

A page is 4096 bytes, what storage reads at once, and no row straddles two: a
page holds as many whole rows as fit (15 of 264 bytes, 3 % of it unused), a row
above 4096 bytes takes pages of its own. Row r of a layer starts at

  start + (r // rows_per_page) page_bytes + (r % rows_per_page) bytes_per_row

so that a random read touches one page and brings values and scales together. A
block is as many pages as fit 4 MiB; the last of a layer may be shorter. The
numbers are little-endian.

To open a file reads the header alone, whatever its size. The rows are a
read-only shared mapping: only pages that were asked for become resident, in the
system's page cache, once for all processes. Checksums are compared on demand
(`RowFile.verify`). A file is written whole or not at all; replacing it leaves
those who have it open with the old one. (Cutting a file that is open is not
survived by its readers: a mapping gets SIGBUS.)
"""

import mmap
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Int, UInt8

from engram_jax.errors import require
from engram_jax.files import open_to_read, whole_file
from engram_jax.identity import WeightsIdentity, require_same_weights
from engram_jax.memory.hashing import NgramHash
from engram_jax.stores.row_file_headers import Header, read_header


def write_row_file(
  path: str | os.PathLike[str],
  chunks: Mapping[int, Iterable[UInt8[np.ndarray, "_rows n"]]],
  header: Header,
) -> None:
  """Writes packed rows as they come; 4 MiB of them are in memory at a time.

  Args:
    path: the file, which appears whole or not at all.
    chunks: per layer of `header`, its rows in order, uint8 [any number,
      bytes_per_row] at a time.
    header: what the file holds.

  Raises:
    InputError: other layers, more or fewer rows than the header says, rows of
      another format, or a folder that cannot be written to.
  """
  path = Path(path)
  layers = list(header.num_rows)
  found = list(chunks)
  require(sorted(found) == sorted(layers), "chunks", found, f"layers {layers}")
  with whole_file(path) as file:
    file.write(header.encode())
    checksums = []
    for layer in layers:
      for block in _blocks(chunks[layer], header, layer):
        file.write(block)
        checksums.append(zlib.crc32(block))
    file.write(_checksum_table(checksums))


def _checksum_table(checksums: list[int]) -> bytes:
  table = np.array(checksums, "<u4").tobytes()
  return table + struct.pack("<I", zlib.crc32(table))


def _blocks(
  chunks: Iterable[np.ndarray], header: Header, layer: int
) -> Iterator[memoryview]:
  """One layer's rows laid out in pages, a block at a time."""
  size, per_page = header.row_format.bytes_per_row, header.rows_per_page
  # Zeros between the rows of one page and the next stay as they are.
  block = np.zeros((header.pages_per_block, header.page_bytes), np.uint8)
  slots = block[:, : per_page * size].reshape(-1, per_page, size)
  room, filled, total = len(block) * per_page, 0, 0
  expected = header.num_rows[layer]
  for chunk in chunks:
    ok = chunk.dtype == np.uint8 and chunk.ndim == 2 and chunk.shape[1] == size
    found = f"{chunk.dtype}{list(chunk.shape)}"
    require(ok, f"chunks[{layer}]", found, f"uint8[rows, {size}]")
    total += len(chunk)
    valid = f"{expected} rows in all"
    require(total <= expected, f"chunks[{layer}]", f"{total} rows", valid)
    while len(chunk):
      part, chunk = chunk[: room - filled], chunk[room - filled :]
      at = np.arange(filled, filled + len(part))
      slots[at // per_page, at % per_page] = part
      filled += len(part)
      if filled == room:
        yield block.data.cast("B")
        filled = 0
        block[:] = 0
  valid = f"{expected} rows in all"
  require(total == expected, f"chunks[{layer}]", f"{total} rows", valid)
  if filled:
    yield block[: -(-filled // per_page)].data.cast("B")


def _identity(file: BinaryIO) -> tuple[int, int]:
  status = os.fstat(file.fileno())
  return status.st_dev, status.st_ino


class RowFile:
  """A row file, open for reading. Any number of threads may read at once.

  Attributes:
    path: the file.
    header: what it says of itself.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    *,
    hashing: NgramHash | None = None,
    compression_digest: str | None = None,
    made_from: WeightsIdentity | None = None,
    allow_other_step: bool = False,
  ):
    """Opens the file and reads its header, no row.

    Args:
      path: a file of `write_row_file`.
      hashing: the hash that the file must have, e.g. a model's; None for any.
      compression_digest: the digest that it must have; None for any.
      made_from: the checkpoint whose rows it must hold; None for any. A file
        that does not say (`header.made_from` is None) is taken.
      allow_other_step: take the rows of another step of the same run.

    Raises:
      InputError: a file that is missing, truncated, damaged in its header, of
        another kind, or of another model, run or step: by the first field
        that differs.
    """
    self.path = Path(path)
    with open_to_read(self.path, "row file") as file:
      self.header = read_header(file, self.path)
      self._require_model(hashing, compression_digest)
      found = self.header.made_from
      if made_from is not None and found is not None:
        require_same_weights(
          found, made_from, self.path, allow_other_step=allow_other_step
        )
      self._identity = _identity(file)
      size = os.fstat(file.fileno()).st_size
      valid = f"{self.header.file_bytes} bytes, as its header says"
      whole = size == self.header.file_bytes
      require(whole, f"size of {self.path}", size, valid)
      self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
      # Neighbours of a row are rows of other n-grams: no reading ahead.
      self._bytes.madvise(mmap.MADV_RANDOM)
    self._starts = self.header.starts()

  def read(
    self,
    layer: int,
    row_ids: Int[np.ndarray, "U"],
    out: UInt8[np.ndarray, "U n"],
  ) -> None:
    """Copies rows of one layer into `out`.

    Args:
      layer: one of the file's.
      row_ids: [U], in any order; ascending ones touch pages in order.
      out: uint8 [U, bytes_per_row], C order.

    Raises:
      InputError: an unknown layer, a row id outside it, or an `out` of another
        shape or dtype.
    """
    header, size = self.header, self.header.row_format.bytes_per_row
    rows = header.num_rows.get(layer, 0)
    require(rows, "layer", layer, f"one of {list(header.num_rows)}")
    ok = out.shape == (row_ids.size, size) and out.dtype == np.uint8
    found = f"{out.dtype}{list(out.shape)}"
    require(ok, "out", found, f"uint8[{row_ids.size}, {size}]")
    if not row_ids.size:
      return
    for wrong in (row_ids.min(), row_ids.max()):
      ok = 0 <= wrong < rows
      require(ok, f"row_ids[{layer}]", wrong, f"0 <= id < {rows}")
    page, slot = np.divmod(row_ids.astype(np.int64), header.rows_per_page)
    # Every place of the file as the start of an entry of a row's size: NumPy
    # indexes these without a copy of the rest, and without its global lock.
    # (np.take would copy an array whose entries overlap, that is, the file.)
    records = np.ndarray(
      header.pages(layer) * header.page_bytes - size + 1,
      f"V{size}",
      buffer=self._bytes,
      offset=self._starts[layer],
      strides=(1,),
    )
    found = records[page * header.page_bytes + slot * size]
    out[...] = found.view(np.uint8).reshape(-1, size)

  def verify(self) -> None:
    """Reads the whole file, a block at a time, and compares every checksum.

    Raises:
      InputError: the first layer and block whose bytes are not those written.
    """
    header = self.header
    with open_to_read(self.path, "row file") as file:
      same = _identity(file) == self._identity
      valid = "the file that was opened: it was replaced since"
      require(same, "row file", self.path, valid)
      file.seek(header.checksums_start)
      table = file.read()
      valid = f"{header.file_bytes} bytes: the file was cut since it was opened"
      size = header.checksums_start + len(table)
      whole = size == header.file_bytes
      require(whole, f"size of {self.path}", size, valid)
      stored = np.frombuffer(table[:-4], "<u4").tolist()
      same = _checksum_table(stored) == table
      valid = "the checksums written: the file is damaged at its end"
      require(same, f"checksums of {self.path}", "other bytes", valid)
      file.seek(next(iter(self._starts.values())))
      expected = iter(stored)
      for layer in header.num_rows:
        left = header.pages(layer) * header.page_bytes
        for block in range(header.blocks(layer)):
          size = min(left, header.pages_per_block * header.page_bytes)
          left -= size
          checksum, wanted = zlib.crc32(file.read(size)), next(expected)
          field = f"checksum of {self.path}, layer {layer}, block {block}"
          require(checksum == wanted, field, checksum, f"{wanted}, as written")

  def _require_model(
    self, hashing: NgramHash | None, compression_digest: str | None
  ) -> None:
    found, wanted = self.header.compression_digest, compression_digest
    field = f"compression_digest of {self.path}"
    require(wanted in (None, found), field, found, str(wanted))
    if hashing is None:
      return
    valid = "the constants of the model's hash"
    known = self.header.hashing is not None
    require(known, f"hash of {self.path}", "none", valid)
    stored = self.header.hashing.to_dict()
    for name, value in hashing.to_dict().items():
      field = f"hash.{name} of {self.path}"
      require(stored[name] == value, field, stored[name], str(value))
