"""Safetensors files: their headers, and their tensors by memory map.

  8 bytes   n, little-endian
  n bytes   JSON: {name: {dtype, shape, data_offsets: [begin, end]}, ...}
  the rest  the tensors, one after another from offset 0 on, no gap

To open a file reads its header alone, whatever its size; tensors are views of a
read-only shared mapping, so that only pages that were asked for become
resident. A file's bytes may be anything: every type and bound is looked at
before a value is used, and a header whose tensors overlap, leave gaps or do not
end where the file ends is refused.

A checkpoint is a folder of such files with `model.safetensors.index.json`,
which says what tensor is in which file. (Cutting a file that is open is not
survived by its readers: a mapping gets SIGBUS.)
"""

import json
import math
import mmap
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from engram_jax.errors import InputError, require
from engram_jax.files import open_to_read

INDEX = "model.safetensors.index.json"

#: Longest header and longest JSON file that is read; the format's own bound.
MAX_JSON = 100_000_000
_MAX_RANK = 32
_BITS = {
  **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
  **dict.fromkeys(("F32", "I32", "U32"), 32),
  **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
  **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
  **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
  **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
  "F4": 4,
}
_ENTRY = ["data_offsets", "dtype", "shape"]
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}\.safetensors")


class Tensor(NamedTuple):
  """Where a tensor lies.

  Attributes:
    dtype: the format's name, e.g. `F8_E4M3`.
    shape: shape of the tensor.
    begin: its first byte, counted from the end of the header.
    end: one past its last.
  """

  dtype: str
  shape: tuple[int, ...]
  begin: int
  end: int

  def __str__(self) -> str:
    return f"{self.dtype}{list(self.shape)}"


class SafetensorsFile:
  """One file, open for reading. Any number of threads may use it at once.

  Attributes:
    path: the file.
    tensors: what its header lists, by name.
    metadata: texts of its header, by name.
  """

  def __init__(self, path: str | os.PathLike[str]):
    """Opens the file and reads its header, no tensor.

    Raises:
      InputError: a file that is missing, or whose header is not one: by the
        tensor, with what was found and what is expected.
    """
    self.path = Path(path)
    with open_to_read(self.path, "file") as file:
      size = os.fstat(file.fileno()).st_size
      header = _read_header(file, size, self.path)
      self.tensors, self.metadata, self._start = header
      self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

  def view(self, name: str) -> UInt8[np.ndarray, "n"]:
    """The bytes of a tensor, uint8, read-only; nothing is read by this."""
    tensor = self.tensors[name]
    count, start = tensor.end - tensor.begin, self._start + tensor.begin
    return np.frombuffer(self._bytes, np.uint8, count, start)

  def read_at_random(self, name: str) -> None:
    """Tells the system that rows of a tensor are read in no order.

    Neighbours of a row are rows of other n-grams: no reading ahead.
    """
    if hasattr(mmap, "MADV_RANDOM"):
      tensor, page = self.tensors[name], mmap.PAGESIZE
      start = (self._start + tensor.begin) // page * page
      length = self._start + tensor.end - start
      if length:
        self._bytes.madvise(mmap.MADV_RANDOM, start, length)


class Shards:
  """A folder of safetensors files; one is opened when it is first asked for.

  Attributes:
    folder: folder of the index and the files.
    file_of: the name of each tensor's file, by the index.
  """

  def __init__(self, folder: str | os.PathLike[str]):
    """Reads the index.

    Raises:
      InputError: it is missing, or no index.
    """
    self.folder = Path(folder)
    path = self.folder / INDEX
    fields = read_json(path)
    self.file_of = fields.get("weight_map")
    kind = type(self.file_of).__name__
    ok = type(self.file_of) is dict
    require(ok, f"weight_map of {path}", kind, "an object of file names")
    self._files: dict[str, SafetensorsFile] = {}

  def find(
    self, name: str, dtypes: Sequence[str], shape: Sequence[int]
  ) -> SafetensorsFile:
    """The file that holds the tensor `name`, which is as it should be.

    Args:
      name: name of the tensor in the index.
      dtypes: dtypes that it may have, in the format's names.
      shape: shape that it must have.

    Raises:
      InputError: there is none, or it has another dtype or shape.
    """
    field = f"weight_map[{name!r}] of {self.folder / INDEX}"
    listed = self.file_of.get(name, "missing")
    ok = type(listed) is str and _SHARD_NAME.fullmatch(listed)
    require(ok, field, repr(listed), "the name of a .safetensors file there")
    if listed not in self._files:
      self._files[listed] = SafetensorsFile(self.folder / listed)
    file = self._files[listed]
    expected = f"{' or '.join(dtypes)} {list(shape)}"
    tensor = file.tensors.get(name)
    ok = tensor is not None and tensor.dtype in dtypes
    ok = ok and tensor.shape == tuple(shape)
    require(ok, f"{name} of {file.path}", tensor or "missing", expected)
    return file


def encode_header(
  tensors: Mapping[str, tuple[str, Sequence[int]]],
  *,
  metadata: Mapping[str, str] | None = None,
) -> bytes:
  """The header of a file that holds `tensors` in this order, with its length.

  Args:
    tensors: (dtype, shape) of each, by name; whole bytes.
    metadata: texts by name, for whoever reads the file; None for none.
  """
  fields, at = {}, 0
  if metadata:
    fields["__metadata__"] = dict(metadata)
  for name, (dtype, shape) in tensors.items():
    end = at + math.prod(shape) * _BITS[dtype] // 8
    offsets = [at, end]
    fields[name] = {
      "dtype": dtype,
      "shape": list(shape),
      "data_offsets": offsets,
    }
    at = end
  text = json.dumps(fields).encode()
  text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8
  return len(text).to_bytes(8, "little") + text


def read_json(path: Path) -> dict[str, Any]:
  """The object in a JSON file.

  Raises:
    InputError: the file is missing, longer than `MAX_JSON`, or holds another
      thing.
  """
  with open_to_read(path, "file") as file:
    size = os.fstat(file.fileno()).st_size
    valid = f"at most {MAX_JSON} bytes"
    require(size <= MAX_JSON, f"size of {path}", size, valid)
    return _parse_json(file.read(), str(path))


def is_size(value: Any) -> bool:
  """Whether JSON's `value` is an integer from 0 to 2**63 - 1."""
  # True is an int, too.
  return type(value) is int and 0 <= value < 2**63


def are_sizes(values: Any) -> bool:
  """Whether JSON's `values` is a list of such integers."""
  return type(values) is list and all(map(is_size, values))


def _parse_json(text: bytes, field: str) -> dict[str, Any]:
  def refuse(constant: str):
    raise ValueError(constant)

  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
      raise ValueError("a name twice")
    return found

  try:
    fields = json.loads(
      text.decode(), parse_constant=refuse, object_pairs_hook=unique
    )
  except (ValueError, RecursionError):
    valid = "JSON text, each name once"
    raise InputError(field, "no JSON text", valid) from None
  kind = type(fields).__name__
  require(type(fields) is dict, field, kind, "a JSON object")
  return fields


def _read_header(
  file, size: int, path: Path
) -> tuple[dict[str, Tensor], dict[str, str], int]:
  """Tensors and texts of a file open at its start; where the first is."""
  start = file.read(8)
  valid = "8 bytes at least: those of the header's length"
  require(len(start) == 8, f"size of {path}", size, valid)
  length, limit = int.from_bytes(start, "little"), min(MAX_JSON, size - 8)
  valid = f"2 to {limit} bytes"
  require(2 <= length <= limit, f"header length of {path}", length, valid)
  fields = _parse_json(file.read(length), f"header of {path}")
  metadata = fields.pop("__metadata__", {})
  ok = type(metadata) is dict
  ok = ok and all(type(text) is str for text in metadata.values())
  require(ok, f"__metadata__ of {path}", repr(metadata), "an object of texts")
  tensors = {
    name: _parse_tensor(entry, f"{_short(name)} of {path}")
    for name, entry in fields.items()
  }
  start, at = 8 + length, 0
  for name, tensor in sorted(tensors.items(), key=lambda x: x[1][2:]):
    begin, end = tensor.begin, tensor.end
    valid = f"a start at {at}, where the tensor before it ends"
    field = f"data_offsets of {_short(name)} of {path}"
    require(begin == at, field, [begin, end], valid)
    at = end
  whole = start + at == size
  valid = f"{start + at} bytes, as its header says"
  require(whole, f"size of {path}", size, valid)
  return tensors, metadata, start


def _parse_tensor(entry: Any, field: str) -> Tensor:
  """A tensor of what JSON gave, which may be anything."""
  found = sorted(entry) if type(entry) is dict else type(entry).__name__
  require(found == _ENTRY, field, found, f"fields {_ENTRY}")
  offsets, dtype, shape = (entry[key] for key in _ENTRY)
  known = type(dtype) is str and dtype in _BITS
  require(known, f"dtype of {field}", repr(dtype), f"one of {', '.join(_BITS)}")
  ok = are_sizes(shape) and len(shape) <= _MAX_RANK
  require(ok, f"shape of {field}", repr(shape), "a list of integers >= 0")
  ok = are_sizes(offsets) and len(offsets) == 2
  require(ok, f"data_offsets of {field}", repr(offsets), "two integers >= 0")
  bits, (begin, end) = math.prod(shape) * _BITS[dtype], offsets
  ok = bits == 8 * (end - begin)
  valid = f"{bits} bits for {dtype}{shape}"
  require(ok, f"data_offsets of {field}", offsets, valid)
  return Tensor(dtype, tuple(shape), begin, end)


def _short(name: str) -> str:
  """A tensor's name for a message: on one line, and not too long."""
  text = ascii(name)[1:-1]
  return text if len(text) <= 120 else f"{text[:117]}..."
