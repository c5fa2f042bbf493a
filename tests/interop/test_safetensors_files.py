"""Safetensors headers: those of the library, and what is refused by name."""

import json
import os

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from engram_jax.errors import InputError
from engram_jax.interop.safetensors_files import (
  SafetensorsFile,
  Shards,
  encode_header,
  read_json,
)

ENTRY = {"dtype": "U8", "shape": [2, 3], "data_offsets": [0, 6]}


def write(path, header, data=bytes(6), length=None):
  """A file of `header`: JSON-able, or the text itself."""
  text = header if type(header) is bytes else json.dumps(header).encode()
  length = len(text) if length is None else length
  path.write_bytes(length.to_bytes(8, "little") + text + data)
  return path


def test_reads_what_the_library_writes(tmp_path):
  random = np.random.default_rng(0)
  arrays = {
    "a.weight": random.normal(size=(3, 5)).astype(np.float32),
    "b": random.integers(0, 9, (2, 2, 2)),
    "empty": np.zeros((0, 4), np.float16),
    "scalar": np.array(3.5),
  }
  path = tmp_path / "x.safetensors"
  safetensors.numpy.save_file(arrays, path, metadata={"format": "np"})
  file = SafetensorsFile(path)
  assert set(file.tensors) == set(arrays)
  for name, array in arrays.items():
    assert file.tensors[name].shape == array.shape
    assert file.view(name).tobytes() == array.tobytes()
  assert str(file.tensors["b"]) == "I64[2, 2, 2]"
  view = file.view("b")
  assert not view.flags.writeable
  file.read_at_random("b")
  file.read_at_random("empty")


def test_the_library_reads_what_encode_header_writes():
  tensors = {"a": ("F8_E4M3", (3, 5)), "b": ("BF16", (2,)), "c": ("F4", (4,))}
  data = np.random.default_rng(0).integers(0, 256, 15 + 4 + 2, np.uint8)
  header = encode_header(tensors)
  assert len(header) % 8 == 0
  found = dict(safetensors.deserialize(header + data.tobytes()))
  places = {"a": (0, 15), "b": (15, 19), "c": (19, 21)}
  for name, (begin, end) in places.items():
    assert found[name]["data"] == data[begin:end].tobytes()
    assert found[name]["dtype"] == tensors[name][0]


def test_a_file_that_holds_only_a_header(tmp_path):
  assert SafetensorsFile(write(tmp_path / "x", {}, b"")).tensors == {}


def changed(**fields):
  return {"t": ENTRY | fields}


@pytest.mark.parametrize(
  "header, match",
  [
    (changed(dtype="U9"), r"^dtype of t of .*: 'U9'; valid: one of F64"),
    (changed(dtype=["U8"]), r"^dtype of t of .*: \['U8'\]"),
    (changed(shape=[2, -3]), r"^shape of t of .*: \[2, -3\]; valid: a list"),
    (changed(shape=[2, 3.0]), r"^shape of t of .*: \[2, 3\.0\]"),
    (changed(shape=[True, 6]), r"^shape of t of "),
    (changed(shape=[1] * 33), r"^shape of t of "),
    (changed(shape=[2, 4]), r"data_offsets of t of .*\[0, 6\]; valid: 64 bits"),
    (changed(shape=[2**60] * 20), r"^data_offsets of t of "),
    (changed(dtype="F4", shape=[3, 3]), r"^data_offsets of t .*36 bits"),
    (changed(data_offsets=[6, 0]), r"^data_offsets of t of .*: \[6, 0\]"),
    (changed(data_offsets=[0]), r"^data_offsets of t .*two integers"),
    (changed(data_offsets=[0, 2**70]), r"^data_offsets of t .*two integers"),
    (changed(data_offsets=[1, 7]), r"^data_offsets of t .*valid: a start at 0"),
    ({"t": ENTRY, "u": ENTRY}, r"^data_offsets of u of .*a start at 6"),
    ({"t": ENTRY | {"more": 1}}, r"^t of .*: \['data_offsets', 'dtype', 'm"),
    ({"t": 3}, r"^t of .*: int; valid: fields"),
    ({"__metadata__": {"a": 1}, "t": ENTRY}, r"^__metadata__ of .*: \{'a': 1"),
    ({"__metadata__": 3, "t": ENTRY}, r"^__metadata__ of .*: 3"),
    ({}, r"^size of .*; valid: 10 bytes, as its header says"),
    ([1], r"^header of .*: list; valid: a JSON object"),
    (b"{ ", r"^header of .*: no JSON text"),
    (b'{"t": NaN}', r"^header of .*: no JSON text"),
    (b'{"t":{"shape":[' + b"9" * 5000 + b"]}}", r"no JSON text"),
    (b"[" * 100_000, r"no JSON text"),
    (b'{"t": 1, "t": 1}', r"no JSON text; valid: JSON text, each name once"),
    ('{"t": 1}'.encode("utf-16"), r"no JSON text"),
    (b'{"a\\nb\\ud800": 1}', r"^a\\nb\\ud800 of .*: int; valid: fields"),
    ({"n" * 900: 1}, r"^n{117}\.\.\. of .*: int"),
  ],
)
def test_refuses_a_header_by_name(tmp_path, header, match):
  path = write(tmp_path / "x.safetensors", header)
  with pytest.raises(InputError, match=match) as error:
    SafetensorsFile(path)
  assert "\n" not in str(error.value)
  str(error.value).encode()


def test_refuses_lengths(tmp_path):
  path = tmp_path / "x"
  for content in (b"", b"1234567"):
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"^size of .*x: {len(content)}; "):
      SafetensorsFile(path)
  for length in (0, 1, 10**6, 2**63, 2**64 - 1):
    write(path, changed(), length=length)
    with pytest.raises(InputError, match=rf"^header length of .*: {length}; "):
      SafetensorsFile(path)
  # One that the file could hold, but that nobody should make an object of.
  write(path, b"{}", length=10**8 + 1)
  os.truncate(path, 10**9)
  with pytest.raises(InputError, match=r"valid: 2 to 100000000 bytes"):
    SafetensorsFile(path)
  for data in (bytes(5), bytes(7)):
    with pytest.raises(InputError, match=r"^size of .*bytes, as its header"):
      SafetensorsFile(write(path, changed(), data))
  with pytest.raises(InputError, match=r"^file: .*missing; valid: an exist"):
    SafetensorsFile(tmp_path / "missing")
  with pytest.raises(InputError, match=r"^file: "):
    SafetensorsFile(tmp_path)


def test_shards_open_only_what_is_asked_for(tmp_path):
  write(tmp_path / "a.safetensors", {"t": ENTRY}, b"abcdef")
  (tmp_path / "b.safetensors").write_bytes(b"not looked at")
  weight_map = {"t": "a.safetensors", "u": "b.safetensors", "v": "../a"}
  weight_map |= {"w": "a.safetensors", "x": 3, "y": "a\0.safetensors"}
  index = tmp_path / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": weight_map}))
  shards = Shards(tmp_path)
  file = shards.find("t", ["U8"], [2, 3])
  assert file.view("t").tobytes() == b"abcdef"
  assert shards.find("t", ["I8", "U8"], (2, 3)) is file
  match = r"^t of .*a\.safetensors: U8\[2, 3\]; valid: U8 \[3, 2\]$"
  with pytest.raises(InputError, match=match):
    shards.find("t", ["U8"], [3, 2])
  with pytest.raises(InputError, match=r"U8\[2, 3\]; valid: BF16 or F32 \["):
    shards.find("t", ["BF16", "F32"], [2, 3])
  with pytest.raises(InputError, match=r"^w of .*a\.safetensors: missing; "):
    shards.find("w", ["U8"], [2, 3])
  for name in "vxy":
    with pytest.raises(InputError, match=rf"^weight_map\['{name}'\] of "):
      shards.find(name, ["U8"], [2, 3])
  with pytest.raises(InputError, match=r"^weight_map\['z'\] of .*'missing'"):
    shards.find("z", ["U8"], [2, 3])
  index.write_text(json.dumps({"weight_map": [1]}))
  with pytest.raises(InputError, match=r"^weight_map of .*: list"):
    Shards(tmp_path)


def test_a_json_file_that_is_too_long(tmp_path):
  path = tmp_path / "config.json"
  path.write_text("{}")
  os.truncate(path, 10**8 + 1)
  with pytest.raises(InputError, match=r"^size of .*at most 100000000 bytes"):
    read_json(path)
