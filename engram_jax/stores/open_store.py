"""The store of a model's rows that a word names, from its tables or a file.

device     packed, in the device's memory
pinned     packed, in pinned host memory
host       packed, in host memory
file:PATH  a row file, which must be the model's, of its run and its step
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from engram_jax.errors import InputError, require
from engram_jax.identity import WeightsIdentity
from engram_jax.memory.hashing import NgramHash
from engram_jax.memory.lookup import Tables, require_tables
from engram_jax.stores.host_stores import FileStore, HostStore
from engram_jax.stores.program_stores import DeviceStore, PinnedStore
from engram_jax.stores.quantization import RowFormat, pack_rows
from engram_jax.stores.row_cache import CachedStore
from engram_jax.stores.row_files import RowFile
from engram_jax.stores.store import RowStore

_FILE = "file:"
_KINDS = {"device": DeviceStore, "pinned": PinnedStore, "host": HostStore}
#: Rows that are packed at a time.
_CHUNK = 2**16


def reads_a_file(location: str) -> bool:
  """Whether the rows are a file's, and no table is needed.

  Raises:
    InputError: a word that names no store.
  """
  valid = f"{', '.join(_KINDS)} or {_FILE}PATH"
  is_file = location.startswith(_FILE)
  require(is_file or location in _KINDS, "store", location, valid)
  return is_file


def open_store(
  location: str,
  tables: Tables | None,
  hashing: NgramHash,
  *,
  row_format: str | None = None,
  compression_digest: str | None = None,
  made_from: WeightsIdentity | None = None,
  allow_other_step: bool = False,
  verify: bool = False,
  cache_bytes: int = 0,
) -> RowStore:
  """A store of the model's rows.

  Args:
    location: where the rows live; see the file's docstring.
    tables: [R, d] per Engram layer, to be packed; None for a file.
    hashing: the model's.
    row_format: format of the packed rows, one of `FORMATS`; None for float32,
      or for what the file has.
    compression_digest: the model's, which a file must have; None for any.
    made_from: the checkpoint whose rows a file must hold; None for any. One
      that does not say whose it holds is taken, and a line logged.
    allow_other_step: take a file of another step of the same run, and log it.
    verify: whether a file's checksums are compared first, which reads all of
      it; without, its header and size alone are.
    cache_bytes: bytes of rows kept on the device before it; 0 for none.

  Raises:
    InputError: an unknown store or format; a file of another model, run or
      step, of another format than the one asked for, or damaged; nothing to
      verify; tables that are missing or not finite; a cache of less than a
      row.
  """
  if reads_a_file(location):
    file = RowFile(
      Path(location.removeprefix(_FILE)).expanduser(),
      hashing=hashing,
      compression_digest=compression_digest,
      made_from=made_from,
      allow_other_step=allow_other_step,
    )
    if made_from is not None:
      _say_whose(file, made_from)
    found = file.header.row_format.name
    valid = f"{found}, the file's, or none"
    require(row_format in (None, found), "row_format", row_format, valid)
    if verify:
      file.verify()
    store = FileStore(file)
  else:
    valid = f"a store that is {_FILE}PATH: {location} has no checksums"
    require(not verify, "verify", verify, valid)
    valid = f"a store that is {_FILE}PATH: {location} has the model's own rows"
    require(not allow_other_step, "allow_other_step", allow_other_step, valid)
    if tables is None:
      raise InputError("tables", None, f"the tables to be kept on {location}")
    packed, fmt = pack_tables(tables, hashing, row_format or "float32")
    store = _KINDS[location](packed, fmt)
  ok = cache_bytes >= 0
  require(ok, "cache_bytes", cache_bytes, "0 for none, or a number of bytes")
  if not cache_bytes:
    return store
  return CachedStore(store, capacity_bytes=cache_bytes)


def _say_whose(file: RowFile, wanted: WeightsIdentity) -> None:
  """Logs that a file's rows may be, or are, not the model's own."""
  found, log = file.header.made_from, logging.getLogger(__name__)
  if found is None:
    line = "%s does not say which checkpoint its rows are from: not compared"
    log.warning(line, file.path)
  elif found.weights != wanted.weights:
    line = "%s holds the rows of step %d, the model is that of step %d"
    log.warning(line, file.path, found.step, wanted.step)


def pack_tables(
  tables: Tables, hashing: NgramHash, name: str
) -> tuple[Mapping[int, UInt8[np.ndarray, "_R n"]], RowFormat]:
  """The rows of all layers in host memory, without the tables' padding.

  Args:
    tables: [R, d] per Engram layer.
    hashing: the model's.
    name: name of the format.

  Raises:
    InputError: tables of another hash or not finite, an unknown format or one
      that does not take their width.
  """
  require_tables(tables, hashing.num_rows)
  row_format = RowFormat(name, next(iter(tables.values())).shape[1])
  packed = {}
  for layer, rows in hashing.num_rows.items():
    out = np.empty((rows, row_format.bytes_per_row), np.uint8)
    for start in range(0, rows, _CHUNK):
      end = min(start + _CHUNK, rows)
      # Of NumPy: only then does it refuse what is not finite.
      part = np.asarray(tables[layer][start:end])
      out[start:end] = pack_rows(part, row_format)
    packed[layer] = out
  return packed, row_format
