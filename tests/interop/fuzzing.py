"""Damaged files: never a crash, a hang or a wrong row, always one clear line.

A case damages a good file and then opens and reads it, or asks a good one for
damaged ids. Two readers: row files (`stores/row_files.py`) and checkpoints in
V4.1's layout (`interop/deepseek_v41.py`). What is damaged:

  header   bytes of it, or a field of its JSON (length and checksum put right)
  tensors  bytes of the rows
  ids      one or all, or their layer
  index, config   of a checkpoint, as the header

A case ends well in one of three ways. `refused`: an `InputError` of one line.
`right`: rows equal those that another reader finds in the same file, which for
checkpoints is the safetensors library and for row files 20 lines below.
`noticed`: a row file's rows changed, and `verify` says so. Any other end is
counted under its own name, and the test fails.
"""

import collections
import contextlib
import json
import pathlib
import random
import signal
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from engram_jax.config import EngramConfig
from engram_jax.errors import InputError, require
from engram_jax.fusion.engram import EngramParams, param_shapes
from engram_jax.interop.deepseek_v41 import open_v41
from engram_jax.interop.v41_export import export_v41
from engram_jax.memory.hashing import NgramHash
from engram_jax.stores.host_stores import FileStore
from engram_jax.stores.quantization import RowFormat
from engram_jax.stores.row_file_headers import Header
from engram_jax.stores.row_files import RowFile, write_row_file

GOOD = ("refused", "right", "noticed")
#: Seconds after which a case counts as hung.
TIME_LIMIT = 20
_FORMAT = RowFormat("fp8", 32)
_CONFIG = EngramConfig(
  hidden_size=16,
  layers=(1, 4),
  rows_per_head=(20, 20),
  heads=2,
  head_dim=32,
  short_conv=False,
  dtype="bfloat16",
)
_HASH = NgramHash.create(
  vocab_size=30, rows_per_head=(20, 20), heads=2, layers=(1, 4), pad_id=2
)


class _WrongRow(Exception):
  """Bytes other than those that the other reader found."""


class _Hang(BaseException):
  """A case took longer than `TIME_LIMIT`."""


def fuzz(count: int, seed: int = 0) -> dict[str, Any]:
  """Runs `count` cases.

  Returns:
    `outcomes` per reader and kind of damage, `failures` (the first ten, as
    text), `slowest_s`, and three `messages` of each kind.

  Raises:
    InputError: a count below 1.
  """
  require(count >= 1, "count", count, "an integer >= 1")
  draw = random.Random(seed)
  outcomes = collections.defaultdict(collections.Counter)
  messages, failures, slowest = collections.defaultdict(list), [], 0.0
  with tempfile.TemporaryDirectory() as folder:
    kinds = _kinds(pathlib.Path(folder))
    for number in range(count):
      name = draw.choice(list(kinds))
      start = time.perf_counter()
      outcome, message = outcome_of(kinds[name], draw)
      slowest = max(slowest, time.perf_counter() - start)
      outcomes[name][outcome] += 1
      if outcome not in GOOD and len(failures) < 10:
        failures.append(f"case {number} of seed {seed}, {name}: {message}")
      if outcome == "refused" and len(messages[name]) < 3:
        messages[name].append(message.replace(folder, "..."))
  return {
    "count": count,
    "seed": seed,
    "outcomes": {name: dict(outcomes[name]) for name in sorted(outcomes)},
    "failures": failures,
    "slowest_s": round(slowest, 3),
    "messages": dict(messages),
  }


def outcome_of(
  case: Callable[[random.Random], str], draw: random.Random
) -> tuple[str, str]:
  """How a case ended, and what it said."""
  try:
    with _time_limit():
      return case(draw), ""
  except InputError as error:
    message = str(error)
    try:
      message.encode()
    except UnicodeEncodeError:
      return "not printable", ascii(message)
    one_line = len(message.splitlines()) == 1
    return "refused" if one_line else "several lines", message
  except _WrongRow as error:
    return "wrong row", str(error)
  except _Hang:
    return "hang", f"more than {TIME_LIMIT} s"
  except Exception as error:
    return type(error).__name__, repr(error)


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
  def stop(*_):
    raise _Hang

  before = signal.signal(signal.SIGALRM, stop)
  signal.alarm(TIME_LIMIT)
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _kinds(folder: pathlib.Path) -> dict[str, Callable[[random.Random], str]]:
  """The good files, and per kind of damage a function that runs a case."""
  rows = {
    layer: np.random.default_rng(layer).integers(
      0, 256, (count, _FORMAT.bytes_per_row), dtype=np.uint8
    )
    for layer, count in _HASH.num_rows.items()
  }
  whole = {layer: [x] for layer, x in rows.items()}
  path = folder / "rows"
  header = Header(_FORMAT, _HASH.num_rows, _HASH, "5a" * 32)
  write_row_file(path, whole, header)
  model = folder / "model"
  arrays = {name: jnp.ones(x) for name, x in param_shapes(_CONFIG).items()}
  params = dict.fromkeys(rows, EngramParams(**arrays))
  export_v41(model, _CONFIG, _HASH, params, whole)
  index, config = model / "model.safetensors.index.json", model / "config.json"
  shards = sorted(model.glob("*.safetensors"))
  row_store = FileStore(RowFile(path))
  store = open_v41(model, released=False).store
  data_start = header.starts()[1]

  def in_row_file(damage) -> Callable[[random.Random], str]:
    content = path.read_bytes()

    def case(draw):
      damaged = _replaced(path, damage(content, draw))
      try:
        return _read_row_file(damaged)
      finally:
        damaged.unlink()

    return case

  def in_checkpoint(files, damage) -> Callable[[random.Random], str]:
    contents = {file: file.read_bytes() for file in files}

    def case(draw):
      file = draw.choice(files)
      # A new file under the name: the good one may be mapped by a store.
      _replaced(file, damage(contents[file], draw)).replace(file)
      try:
        return _read_checkpoint(model)
      finally:
        _replaced(file, contents[file]).replace(file)

    return case

  def shard_header(content, draw):
    length = int.from_bytes(content[:8], "little")
    if draw.random() < 0.5:
      return _bytes_damaged(content, draw, 0, 8 + length)
    text = _json_damaged(content[8 : 8 + length], draw)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]

  def shard_data(content, draw):
    start = 8 + int.from_bytes(content[:8], "little")
    return _bytes_damaged(content, draw, start, len(content))

  def text(content, draw):
    if draw.random() < 0.5:
      return _bytes_damaged(content, draw, 0, len(content))
    return _json_damaged(content, draw)

  return {
    "row file, header": in_row_file(
      lambda content, draw: _row_header_damaged(content, draw, data_start)
    ),
    "row file, tensors": in_row_file(
      lambda content, draw: _bytes_damaged(
        content, draw, data_start, len(content)
      )
    ),
    "row file, ids": lambda draw: _ask(row_store, rows, draw),
    "safetensors, header": in_checkpoint(shards, shard_header),
    "safetensors, tensors": in_checkpoint(shards, shard_data),
    "safetensors, ids": lambda draw: _ask(store, rows, draw),
    "safetensors, index": in_checkpoint([index], text),
    "safetensors, config": in_checkpoint([config], text),
  }


def _replaced(path: pathlib.Path, content: bytes) -> pathlib.Path:
  new = path.with_name(f".{path.name}.new")
  new.write_bytes(content)
  return new


# --- damage ---

_NUMBERS = (0, 1, -1, 2, 31, 33, 255, 2**31, 2**32, 2**63, 2**64, 10**400)
_VALUES = (None, True, 1.5, 1e308, "", "F64", "\ud800\n", "../x", [], [1], {})


def _bytes_damaged(
  content: bytes, draw: random.Random, start: int, end: int
) -> bytes:
  """Bytes from `start` to `end` changed, dropped, inserted; or a cut file."""
  damaged = bytearray(content)
  at = draw.randrange(start, end)
  length = min(draw.choice((1, 1, 1, 2, 8, 100)), end - at)
  kind = draw.choice(("bit", "bit", "bytes", "drop", "insert", "cut", "zeros"))
  if kind == "bit":
    damaged[at] ^= 1 << draw.randrange(8)
  elif kind == "bytes":
    damaged[at : at + length] = draw.randbytes(length)
  elif kind == "drop":
    del damaged[at : at + length]
  elif kind == "insert":
    damaged[at:at] = draw.randbytes(length)
  elif kind == "cut":
    del damaged[at:]
  else:
    damaged[at : at + length] = bytes(length)
  return bytes(damaged)


def _json_damaged(text: bytes, draw: random.Random) -> bytes:
  """A value, name or item somewhere in a JSON text changed."""
  whole = json.loads(text)
  places = list(_places(whole))
  parent, key = draw.choice(places)
  value = parent[key]
  kind = draw.choice(("number", "value", "near", "drop", "name", "deep"))
  if kind == "number":
    parent[key] = draw.choice(_NUMBERS)
  elif kind == "near" and type(value) is int:
    parent[key] = value + draw.choice((-33, -32, -1, 1, 32, 33))
  elif kind == "drop":
    del parent[key]
  elif kind == "name" and type(parent) is dict:
    parent[str(draw.choice(_VALUES))] = parent.pop(key)
  elif kind == "deep":
    parent[key] = "@"
    depth = draw.choice((3, 5000))
    deep = "[" * depth + "]" * depth
    return json.dumps(whole).replace('"@"', deep).encode()
  else:
    parent[key] = draw.choice(_VALUES)
  return json.dumps(whole).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
  items = value.items() if type(value) is dict else enumerate(value)
  for key, item in list(items):
    yield value, key
    if type(item) in (dict, list):
      yield from _places(item)


_PREAMBLE = struct.Struct("<8sIII")


def _row_header_damaged(
  content: bytes, draw: random.Random, data_start: int
) -> bytes:
  if draw.random() < 0.5:
    return _bytes_damaged(content, draw, 0, data_start)
  magic, version, length, _ = _PREAMBLE.unpack(content[: _PREAMBLE.size])
  text = _json_damaged(content[_PREAMBLE.size :][:length], draw)
  start = _PREAMBLE.pack(magic, version, len(text), zlib.crc32(text))
  head = start + text
  head += bytes(-len(head) % 4096)
  return head + content[data_start:]


# --- what the readers say, and what is there ---


def _read_row_file(path: pathlib.Path) -> str:
  file = RowFile(path)
  for layer, expected in _rows_of_row_file(path.read_bytes()).items():
    found = np.empty_like(expected)
    file.read(layer, np.arange(len(expected)), found)
    if not np.array_equal(found, expected):
      raise _WrongRow(f"layer {layer}")
  try:
    file.verify()
  except InputError as error:
    if "\n" in str(error):
      raise
    return "noticed"
  return "right"


def _rows_of_row_file(content: bytes) -> dict[int, np.ndarray]:
  """The rows by the format's description alone."""
  length = _PREAMBLE.unpack(content[: _PREAMBLE.size])[2]
  fields = json.loads(content[_PREAMBLE.size :][:length])
  d = fields["width"]
  sizes = {"float32": 4 * d, "bfloat16": 2 * d, "int8": d + 4}
  size = sizes.get(fields["format"], d + d // 32)
  page = -(-size // 4096) * 4096
  at, rows = -(-(_PREAMBLE.size + length) // 4096) * 4096, {}
  for layer, count in zip(fields["layers"], fields["num_rows"]):
    starts = [
      at + row // (page // size) * page + row % (page // size) * size
      for row in range(count)
    ]
    joined = b"".join(content[start : start + size] for start in starts)
    rows[layer] = np.frombuffer(joined, np.uint8).reshape(count, size)
    at += -(-count // (page // size)) * page
  return rows


def _read_checkpoint(folder: pathlib.Path) -> str:
  checkpoint = open_v41(folder, released=False)
  index = json.loads((folder / "model.safetensors.index.json").read_bytes())
  for layer, count in checkpoint.store.num_rows.items():
    parts = []
    for name in ("weight", "scale"):
      name = f"layers.{layer}.engram.embed.{name}"
      content = (folder / index["weight_map"][name]).read_bytes()
      data = dict(safetensors.deserialize(content))[name]["data"]
      parts.append(np.frombuffer(data, np.uint8).reshape(count, -1))
    expected = np.concatenate(parts, axis=1)
    ids = np.arange(count)
    found = checkpoint.store.read({layer: ids}).packed[layer][:count]
    if not np.array_equal(found, expected):
      raise _WrongRow(f"layer {layer}")
    checkpoint.params(layer)
  return "right"


def _ask(store, rows: dict[int, np.ndarray], draw: random.Random) -> str:
  """Asks a good store for ids of any kind."""
  layer = draw.choice((1, 4, 4, 1, 1, 0, -1))
  count = len(rows.get(layer, rows[1]))
  shape = draw.choice(((), (0,), (3,), (2, 5), (1, 2, 3)))
  dtype = draw.choice(("int16", "int32", "int64"))
  size = int(np.prod(shape))
  ids = [draw.randrange(min(count, 256)) for _ in range(size)]
  array = np.array(ids, dtype).reshape(shape)
  kind = draw.choice(("good", "one", "all"))
  if kind == "one" and size:
    wrong = draw.choice((-1, count, count + 1, 2**31 - 1, -(2**31), 2**62))
    array = array.astype(np.int64)
    array.flat[draw.randrange(size)] = wrong
  elif kind == "all":
    low, high = -(2**63), 2**63 - 1
    array = np.array([draw.randint(low, high) for _ in ids]).reshape(shape)
    array = array.astype(np.int64)
  found = store.read({layer: array})
  packed = found.packed[layer][found.inverse[layer]]
  if not np.array_equal(packed, rows[layer][array.astype(np.int64)]):
    raise _WrongRow(f"layer {layer}, ids {array.tolist()}")
  return "right"
