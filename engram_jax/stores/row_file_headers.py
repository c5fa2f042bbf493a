"""The header of a row file (`row_files.py`): fields, layout and parser.

  magic, version, length and CRC-32 of the text that follows, little-endian
  a JSON text: format, width, layers, num_rows, hash, compression_digest,
    made_from
  zeros up to a multiple of 4096 bytes

Where rows and checksums lie follows from the fields, so that no offset is
stored and none can be wrong. A file's bytes may be anything: the parser
looks at every type and bound before it uses a value, and takes a header only
if writing it again gives the same bytes.

Version 1 had no `made_from`. Its files are read as before, and whose rows they
hold is unknown.
"""

import dataclasses
import json
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from engram_jax.errors import InputError, require
from engram_jax.identity import WeightsIdentity
from engram_jax.memory.hashing import NgramHash
from engram_jax.stores.quantization import RowFormat

PAGE = 4096
#: Of rows under one checksum, at most.
BLOCK_BYTES = 4 * 2**20
#: Of the layout of `row_files.py`.
FORMAT_VERSION = 2
#: Those that are read.
KNOWN_VERSIONS = (1, 2)

_MAGIC = b"ENGRROWS"
# Magic, version, length and CRC-32 of the JSON text.
_PREAMBLE = struct.Struct("<8sIII")
# Bounds on what a file may claim, so that nothing large is made of a bad one.
_MAX_JSON = 2**20
_MAX_ROW_BYTES = 2**20
_MAX_ROWS = 2**48
_HEX = set("0123456789abcdef")


@dataclasses.dataclass(frozen=True, eq=False)
class Header:
  """What a row file says of itself, and where that puts its rows.

  Attributes:
    row_format: format of every row.
    num_rows: R per layer, in the file's order.
    hashing: the hash whose ids name these rows; None if unknown.
    compression_digest: `TokenCompression.digest` under which they were
      trained; None if unknown.
    made_from: the checkpoint whose rows they are; None if unknown.
    version: version of the file; `made_from` is None in one of version 1.
  """

  row_format: RowFormat
  num_rows: Mapping[int, int]
  hashing: NgramHash | None = None
  compression_digest: str | None = None
  made_from: WeightsIdentity | None = None
  version: int = FORMAT_VERSION

  def __post_init__(self):
    """Refuses what no file can hold, and rows that the hash does not name."""
    known = self.version in KNOWN_VERSIONS
    require(known, "version", self.version, f"one of {KNOWN_VERSIONS}")
    ok = self.made_from is None or self.version > 1
    require(ok, "made_from", self.made_from, "None in version 1")
    ok = len(self.num_rows) >= 1 and min(self.num_rows) >= 0
    require(ok, "layers", list(self.num_rows), "one or more ids from 0 on")
    size = self.row_format.bytes_per_row
    valid = f"rows of at most {_MAX_ROW_BYTES} bytes"
    require(size <= _MAX_ROW_BYTES, "width", self.row_format.width, valid)
    for layer, rows in self.num_rows.items():
      ok = 1 <= rows <= _MAX_ROWS
      require(ok, f"num_rows[{layer}]", rows, f"1 to {_MAX_ROWS} rows")
    digest = self.compression_digest
    ok = digest is None or (len(digest) == 64 and set(digest) <= _HEX)
    require(ok, "compression_digest", digest, "64 hexadecimal digits")
    if self.hashing is not None:
      wanted = self.hashing.num_rows
      same = list(wanted) == list(self.num_rows)
      valid = f"the hash's, {list(wanted)}"
      require(same, "layers", list(self.num_rows), valid)
      for layer, rows in self.num_rows.items():
        valid = f"at least the hash's {wanted[layer]}"
        require(rows >= wanted[layer], f"num_rows[{layer}]", rows, valid)

  @property
  def page_bytes(self) -> int:
    """Bytes of a page: 4096, or a multiple where a row needs more."""
    return -(-self.row_format.bytes_per_row // PAGE) * PAGE

  @property
  def rows_per_page(self) -> int:
    """Whole rows in a page."""
    return self.page_bytes // self.row_format.bytes_per_row

  @property
  def pages_per_block(self) -> int:
    """Pages under one checksum."""
    return max(1, BLOCK_BYTES // self.page_bytes)

  def pages(self, layer: int) -> int:
    """Pages of one layer."""
    return -(-self.num_rows[layer] // self.rows_per_page)

  def blocks(self, layer: int) -> int:
    """Checksums of one layer."""
    return -(-self.pages(layer) // self.pages_per_block)

  def starts(self) -> dict[int, int]:
    """Where each layer's rows start in the file."""
    starts, at = {}, len(self.encode())
    for layer in self.num_rows:
      starts[layer] = at
      at += self.pages(layer) * self.page_bytes
    return starts

  @property
  def checksums_start(self) -> int:
    """Where the rows end."""
    pages = sum(self.pages(layer) for layer in self.num_rows)
    return len(self.encode()) + pages * self.page_bytes

  @property
  def file_bytes(self) -> int:
    """Size of the whole file."""
    blocks = sum(self.blocks(layer) for layer in self.num_rows)
    return self.checksums_start + 4 * (blocks + 1)

  def encode(self) -> bytes:
    """The header's pages.

    Raises:
      InputError: hash constants of more than 1 MiB.
    """
    fields = {
      "format": self.row_format.name,
      "width": self.row_format.width,
      "layers": list(self.num_rows),
      "num_rows": list(self.num_rows.values()),
      "hash": None if self.hashing is None else self.hashing.to_dict(),
      "compression_digest": self.compression_digest,
    }
    if self.version > 1:
      made_from = self.made_from
      fields["made_from"] = None if made_from is None else made_from.to_dict()
    text = json.dumps(fields).encode()
    valid = f"a header of at most {_MAX_JSON} bytes"
    require(len(text) <= _MAX_JSON, "hashing", f"{len(text)} bytes", valid)
    start = _PREAMBLE.pack(_MAGIC, self.version, len(text), zlib.crc32(text))
    whole = start + text
    return whole + bytes(-len(whole) % PAGE)


def read_header(file: BinaryIO, path: Path) -> Header:
  """The header of a file open at its start, and no byte more.

  Args:
    file: opened for reading bytes.
    path: its name, for messages.

  Raises:
    InputError: the file does not start with a header of `Header.encode`.
  """
  start = file.read(_PREAMBLE.size)
  valid = "a file written by write_row_file"
  ok = len(start) == _PREAMBLE.size and start.startswith(_MAGIC)
  require(ok, f"start of {path}", start[: len(_MAGIC)], valid)
  _, version, length, checksum = _PREAMBLE.unpack(start)
  known = version in KNOWN_VERSIONS
  valid = " or ".join(map(str, KNOWN_VERSIONS))
  require(known, f"version of {path}", version, valid)
  ok = 0 < length <= _MAX_JSON
  require(ok, f"header length of {path}", length, f"1 to {_MAX_JSON} bytes")
  text = file.read(length)
  same = len(text) == length and zlib.crc32(text) == checksum
  valid = f"{checksum}: the header is damaged"
  require(same, f"header checksum of {path}", zlib.crc32(text), valid)
  try:
    fields = json.loads(text)
  except (ValueError, RecursionError):
    valid = "JSON text"
    raise InputError(f"header of {path}", "no JSON text", valid) from None
  try:
    header = _parse(fields, version)
  except InputError as error:
    field = f"{error.field} of {path}"
    raise InputError(field, error.value, error.valid) from None
  rest = file.read(-file.tell() % PAGE)
  padded = start + text + rest == header.encode()
  valid = "the bytes that its own fields give"
  require(padded, f"header of {path}", "other bytes", valid)
  return header


def _is_int(value: Any) -> bool:
  # True is an int, too. Beyond 64 bits NumPy raises.
  return type(value) is int and 0 <= value < 2**63


def _are_ints(values: Any) -> bool:
  return type(values) is list and all(map(_is_int, values))


def _parse(fields: Any, version: int) -> Header:
  """A header of what JSON gave, which may be anything."""
  names = "format width layers num_rows hash compression_digest".split()
  names += ["made_from"] if version > 1 else []
  found = sorted(fields) if type(fields) is dict else type(fields).__name__
  require(found == sorted(names), "header", found, f"fields {sorted(names)}")
  name, width, layers, num_rows, constants, digest = map(fields.get, names[:6])
  require(type(name) is str, "format", name, "a name")
  ok = _is_int(width) and width <= _MAX_ROW_BYTES
  require(ok, "width", width, f"an integer from 1 to {_MAX_ROW_BYTES}")
  ok = _are_ints(layers) and len(set(layers)) == len(layers) >= 1
  require(ok, "layers", layers, "different layer ids")
  ok = _are_ints(num_rows) and len(num_rows) == len(layers)
  require(ok, "num_rows", num_rows, "an integer for each layer")
  ok = digest is None or type(digest) is str
  require(ok, "compression_digest", digest, "64 hexadecimal digits")
  hashing = None if constants is None else _parse_hash(constants)
  num_rows = dict(zip(layers, num_rows))
  made_from = fields.get("made_from")
  if made_from is not None:
    made_from = WeightsIdentity.from_dict(made_from)
  row_format = RowFormat(name, width)
  return Header(row_format, num_rows, hashing, digest, made_from, version)


def _parse_hash(constants: Any) -> NgramHash:
  """`NgramHash.from_dict` of what may be anything."""
  kind = type(constants).__name__
  require(type(constants) is dict, "hash", kind, "hash constants or null")
  smallest = constants.get("smallest_order", 2)
  ok = _is_int(smallest) and smallest >= 1
  require(ok, "hash.smallest_order", smallest, "an integer >= 1")
  for name in ("vocab_size", "heads", "pad_id"):
    value = constants.get(name)
    require(_is_int(value), f"hash.{name}", value, "an integer >= 0")
  layers = constants.get("layers")
  ok = _are_ints(layers) and len(set(layers)) == len(layers) >= 1
  require(ok, "hash.layers", layers, "different layer ids")
  for name in ("multipliers", "primes"):
    lists = constants.get(name)
    ok = type(lists) is list and len(lists) == len(layers)
    ok = ok and all(_are_ints(values) and values for values in lists)
    valid = "a list of integers >= 0 for each layer"
    require(ok, f"hash.{name}", lists, valid)
  orders = {len(values) for values in constants["multipliers"]}
  ok = len(orders) == 1 and min(orders) >= smallest
  valid = f"as many for each layer, {smallest} or more"
  require(ok, "hash.multipliers", f"{sorted(orders)} of them", valid)
  return NgramHash.from_dict(constants)
