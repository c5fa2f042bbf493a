"""Row files: what is read, what is refused, and that opening reads no row."""

import json
import os
import pathlib
import re
import struct
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import pytest

from engram_jax.errors import InputError
from engram_jax.identity import WeightsIdentity
from engram_jax.memory.hashing import NgramHash
from engram_jax.stores.quantization import RowFormat
from engram_jax.stores.row_file_headers import Header
from engram_jax.stores.row_files import RowFile, write_row_file

FP8 = RowFormat("fp8", 256)
DIGEST = "5a" * 32
MADE_FROM = WeightsIdentity("ab" * 32, 12, "cd" * 32)
HASH = NgramHash.create(
  vocab_size=50, rows_per_head=(30, 40), heads=2, layers=(1, 14), pad_id=2
)


def rows_of(header, seed=0):
  random = np.random.default_rng(seed)
  size = header.row_format.bytes_per_row
  return {
    layer: random.integers(0, 256, (rows, size), dtype=np.uint8)
    for layer, rows in header.num_rows.items()
  }


def chunked(rows, step):
  def of(x):
    yield from (x[i : i + step] for i in range(0, len(x), step))

  return {layer: of(x) for layer, x in rows.items()}


def read(file, layer, ids):
  ids = np.asarray(ids)
  out = np.empty((len(ids), file.header.row_format.bytes_per_row), np.uint8)
  file.read(layer, ids, out)
  return out


@pytest.fixture
def written(tmp_path):
  """A small file of two layers with hash constants, and its rows."""
  header = Header(FP8, HASH.num_rows, HASH, DIGEST, MADE_FROM)
  rows = rows_of(header)
  write_row_file(tmp_path / "rows", chunked(rows, 37), header)
  return tmp_path / "rows", rows


@pytest.mark.parametrize("step", [1, 14, 15, 1000])
@pytest.mark.parametrize(
  "row_format",
  [
    FP8,  # 15 rows a page
    RowFormat("float32", 64),  # 16, and no room left
    RowFormat("int8", 3),
    RowFormat("float32", 1024),  # a page each
    RowFormat("float32", 1030),  # two pages each
  ],
  ids=lambda f: f"{f.name}-{f.width}",
)
def test_every_row_comes_back(tmp_path, row_format, step):
  header = Header(row_format, {7: 61, 3: 1, 0: 15})
  rows = rows_of(header)
  write_row_file(tmp_path / "rows", chunked(rows, step), header)
  file = RowFile(tmp_path / "rows")
  assert os.listdir(tmp_path) == ["rows"]
  assert file.header.row_format == row_format
  assert list(file.header.num_rows.items()) == [(7, 61), (3, 1), (0, 15)]
  file.verify()
  random = np.random.default_rng(1)
  for layer, expected in rows.items():
    ids = random.integers(0, len(expected), 100)
    np.testing.assert_array_equal(read(file, layer, ids), expected[ids])
  assert read(file, 7, np.zeros(0, np.int32)).size == 0


def test_layout_is_the_one_described(written):
  path, rows = written
  data, header = path.read_bytes(), RowFile(path).header
  magic, version, length, checksum = struct.unpack("<8sIII", data[:20])
  text = data[20 : 20 + length]
  assert (magic, version, zlib.crc32(text)) == (b"ENGRROWS", 2, checksum)
  assert json.loads(text)["hash"] == HASH.to_dict()
  assert header.rows_per_page == 15 and header.file_bytes == len(data)
  start = 4096 * -(-(20 + length) // 4096)
  for layer, expected in rows.items():
    assert header.starts()[layer] == start
    for row, row_bytes in enumerate(expected):
      at = start + row // 15 * 4096 + row % 15 * 264
      assert data[at : at + 264] == row_bytes.tobytes()
      assert at // 4096 == (at + 263) // 4096  # one page
    start += -(-len(expected) // 15) * 4096
  assert len(data) == start + 4 * (2 + 1)  # two blocks, and the table's own


def test_blocks_of_checksums_span_many_pages(tmp_path):
  rows = 15 * 1024 + 1  # one block of 4 MiB and a page
  header = Header(RowFormat("fp8", 256), {1: rows, 2: 5})
  assert (header.blocks(1), header.blocks(2)) == (2, 1)
  packed = rows_of(header)
  write_row_file(tmp_path / "rows", chunked(packed, 4000), header)
  file = RowFile(tmp_path / "rows")
  file.verify()
  np.testing.assert_array_equal(
    read(file, 1, [rows - 1, 0]), packed[1][[-1, 0]]
  )
  data = bytearray((tmp_path / "rows").read_bytes())
  data[file.header.starts()[1] + 4 * 2**20 + 100] ^= 1
  (tmp_path / "rows").write_bytes(data)
  with pytest.raises(InputError, match=r"layer 1, block 1: \d+; valid: \d+"):
    RowFile(tmp_path / "rows").verify()


def test_only_room_for_the_rows_asked_for_is_filled(written):
  path, _ = written
  file = RowFile(path)
  (layer, *_), size = file.header.num_rows, file.header.row_format.bytes_per_row
  # Of another number of rows the type checker of these tests knows already.
  out = np.empty((1, size - 1), np.uint8)
  valid = rf"valid: uint8\[1, {size}\]"
  with pytest.raises(InputError, match=f"^out: .*; {valid}"):
    file.read(layer, np.array([0]), out)


def test_a_file_of_another_model_is_refused_by_name(written):
  path, _ = written
  RowFile(path, hashing=HASH, compression_digest=DIGEST)
  with pytest.raises(InputError, match=r"compression_digest of .*rows: 5a5a"):
    RowFile(path, compression_digest="00" * 32)
  changes = {"pad_id": 3, "heads": 1, "vocab_size": 51}
  fields = dict(rows_per_head=(30, 40), heads=2, layers=(1, 14), pad_id=2)
  for name, value in changes.items():
    other = NgramHash.create(**({"vocab_size": 50} | fields | {name: value}))
    with pytest.raises(InputError, match=rf"hash\.{name} of .*rows: "):
      RowFile(path, hashing=other)
  other = NgramHash.create(**({"vocab_size": 50} | fields), seed=1)
  with pytest.raises(InputError, match=r"hash\.multipliers of .*rows: "):
    RowFile(path, hashing=other)
  plain = Header(FP8, {1: 3})
  write_row_file(path, rows_of_chunks(plain), plain)
  with pytest.raises(InputError, match=r"hash of .*rows: none"):
    RowFile(path, hashing=HASH)


def test_rows_of_another_run_or_step_are_refused_by_name(written):
  path, _ = written
  assert RowFile(path, made_from=MADE_FROM).header.made_from == MADE_FROM
  other = dict(run="ef" * 32, step=8, weights="01" * 32)
  cases = {
    "run": dict(other),
    "step": other | {"run": MADE_FROM.run},
    "weights": other | {"run": MADE_FROM.run, "step": MADE_FROM.step},
  }
  for name, fields in cases.items():
    wanted = WeightsIdentity(**fields)
    found, mine = getattr(MADE_FROM, name), getattr(wanted, name)
    match = rf"^{name} of {path}: {found}; valid: {mine}, the checkpoint's"
    with pytest.raises(InputError, match=match):
      RowFile(path, made_from=wanted)
    # Leave to read another step is no leave to read another run.
    if name == "step":
      RowFile(path, made_from=wanted, allow_other_step=True)
    else:
      with pytest.raises(InputError, match=match):
        RowFile(path, made_from=wanted, allow_other_step=True)


def test_a_file_of_version_1_is_read_and_says_nothing_of_its_rows(tmp_path):
  header = Header(FP8, HASH.num_rows, HASH, DIGEST, version=1)
  rows, path = rows_of(header), tmp_path / "rows"
  write_row_file(path, chunked(rows, 37), header)
  assert struct.unpack("<I", path.read_bytes()[8:12])[0] == 1
  file = RowFile(path, hashing=HASH, made_from=MADE_FROM)
  file.verify()
  assert (file.header.version, file.header.made_from) == (1, None)
  np.testing.assert_array_equal(read(file, 14, range(9)), rows[14][:9])
  # It has no place for more.
  with pytest.raises(
    InputError, match=r"made_from: .*valid: None in version 1"
  ):
    Header(FP8, {1: 3}, made_from=MADE_FROM, version=1)
  with pytest.raises(InputError, match=r"^version: 3; valid: "):
    Header(FP8, {1: 3}, version=3)


def rows_of_chunks(header):
  return {layer: [x] for layer, x in rows_of(header).items()}


def test_headers_that_no_file_can_have_are_refused():
  for arguments, message in (
    (({},), "layers: \\[\\]"),
    (({-1: 3},), "layers: \\[-1\\]"),
    (({1: 0},), r"num_rows\[1\]: 0"),
    (({1: 2**60},), r"num_rows\[1\]: "),
    (({1: 3}, None, "abc"), "compression_digest: abc"),
    (({14: 500, 1: 500}, HASH), r"layers: \[14, 1\]; valid: the hash's"),
    (({1: 1, 14: 500}, HASH), r"num_rows\[1\]: 1; valid: at least"),
  ):
    with pytest.raises(InputError, match=message):
      Header(FP8, *arguments)
  with pytest.raises(InputError, match="width: 262145; valid: rows of at most"):
    Header(RowFormat("float32", 2**18 + 1), {1: 1})
  # More rows than the hash names are padding.
  Header(FP8, {1: 500, 14: 500}, HASH)


def test_writing_is_whole_or_not_at_all(tmp_path):
  header = Header(FP8, {1: 40})
  path, rows = tmp_path / "rows", rows_of(header)[1]
  bad = {
    "40 rows in all": [[rows[:39]], [rows, rows[:1]], []],
    r"uint8\[rows, 264\]": [[rows[:, :263]], [rows.astype(np.int8)], [rows[0]]],
  }
  for message, cases in bad.items():
    for chunks in cases:
      with pytest.raises(InputError, match=rf"chunks\[1\]: .*valid: {message}"):
        write_row_file(path, {1: iter(chunks)}, header)
      assert not os.listdir(tmp_path)
  with pytest.raises(InputError, match=r"chunks: \[2\]; valid: layers \[1\]"):
    write_row_file(path, {2: [rows]}, header)
  with pytest.raises(
    InputError, match=r"path: .*missing/rows; valid: a file in"
  ):
    write_row_file(tmp_path / "missing" / "rows", {1: [rows]}, header)

  def breaks():
    yield rows[:20]
    raise RuntimeError("the source failed")

  path.write_text("what was there")
  with pytest.raises(RuntimeError, match="the source failed"):
    write_row_file(path, {1: breaks()}, header)
  assert os.listdir(tmp_path) == ["rows"]
  assert path.read_text() == "what was there"


def test_who_has_a_replaced_file_open_keeps_the_old_one(written):
  path, rows = written
  file = RowFile(path)
  header = Header(FP8, {1: 3})
  write_row_file(path, rows_of_chunks(header), header)
  np.testing.assert_array_equal(read(file, 14, range(9)), rows[14][:9])
  with pytest.raises(InputError, match=r"row file: .*it was replaced since"):
    file.verify()


def test_truncated_and_foreign_files_are_refused_by_name(written, tmp_path):
  path, _ = written
  data = path.read_bytes()
  name = re.escape(str(path))
  for size in (0, 7, 8, 19, 20, 500, 4095, 4096, len(data) - 1):
    path.write_bytes(data[:size])
    with pytest.raises(InputError, match=name) as error:
      RowFile(path)
    assert "\n" not in str(error.value)
  assert str(error.value) == (
    f"size of {path}: {len(data) - 1}; valid: {len(data)} bytes, as its header"
    " says"
  )
  path.write_bytes(data + b"\0")
  with pytest.raises(InputError, match=f"size of {name}"):
    RowFile(path)
  for foreign in (b"PK\3\4" * 3000, b"\0" * 9000, b"{}", data[1:]):
    path.write_bytes(foreign)
    with pytest.raises(InputError, match=f"start of {name}: .*written by"):
      RowFile(path)
  for missing in (tmp_path / "none", tmp_path):
    with pytest.raises(
      InputError, match=r"row file: .*valid: an existing file"
    ):
      RowFile(missing)
  path.write_bytes(data[:8] + struct.pack("<I", 3) + data[12:])
  with pytest.raises(InputError, match=f"version of {name}: 3; valid: 1 or 2"):
    RowFile(path)
  path.write_bytes(data[:12] + struct.pack("<I", 2**32 - 1) + data[16:])
  with pytest.raises(InputError, match=f"header length of {name}: 4294967295"):
    RowFile(path)


def test_every_damaged_byte_is_found(written):
  path, _ = written
  data = path.read_bytes()
  header = RowFile(path).header
  random = np.random.default_rng(0)
  text_end = 20 + struct.unpack("<I", data[12:16])[0]
  places = [*range(0, 24), text_end - 1, text_end, 4095, header.checksums_start]
  for at in [*places, len(data) - 1, *random.integers(24, len(data), 60)]:
    damaged = bytearray(data)
    damaged[at] ^= 1 << random.integers(8)
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=re.escape(str(path))):
      RowFile(path).verify()
    if header.starts()[1] <= at < header.checksums_start:
      RowFile(path)  # opening does not read the rows


def mutated(value, random):
  """JSON values like `value`, with something else somewhere in them."""
  odd = [None, True, -1, 0, 1, 2**31, 2**63, 10**400, 0.5, 1e308, float("nan")]
  odd += ["", "fp8", "\ud800", "a" * 5000, [], [[]], {}, {"a": 1}, [1, 1], [-1]]
  if type(value) is dict and random.integers(6):
    key = random.choice(list(value))
    choice = random.integers(8)
    if choice == 0:
      return {k: v for k, v in value.items() if k != key}
    if choice == 1:
      return value | {"other": 1}
    return value | {str(key): mutated(value[key], random)}
  if type(value) is list and value and random.integers(4):
    at = random.integers(len(value))
    choice = random.integers(4)
    if choice == 0:
      return value[:at] + value[at + 1 :]
    if choice == 1:
      return [*value, value[at]]
    return [*value[:at], mutated(value[at], random), *value[at + 1 :]]
  return odd[random.integers(len(odd))]


def with_text(text):
  start = struct.pack("<8sIII", b"ENGRROWS", 2, len(text), zlib.crc32(text))
  return start + text + bytes(-(len(start) + len(text)) % 4096)


def test_headers_of_anything_are_refused_in_one_line(written):
  path, _ = written
  data = path.read_bytes()
  length = struct.unpack("<I", data[12:16])[0]
  fields = json.loads(data[20 : 20 + length])
  random = np.random.default_rng(0)
  texts = [json.dumps(mutated(fields, random)).encode() for _ in range(400)]
  texts += [b"[" * 200_000, b"1" * 5000, b"\xff\xfe", b'"', b"nul"]
  texts += [json.dumps(fields, indent=1).encode()]
  texts += [
    json.dumps(fields).replace('"width"', '"width": 1, "width"').encode()
  ]
  for _ in range(100):  # bytes of the text, not of its values
    text = bytearray(data[20 : 20 + length])
    text[random.integers(length)] = random.integers(256)
    texts.append(bytes(text))
  start = time.monotonic()
  refused = 0
  for text in texts:
    # With a right checksum, so that the parser sees it; and all that follows.
    path.write_bytes(with_text(text) + data[len(with_text(b" " * length)) :])
    try:
      file = RowFile(path)
    except InputError as error:
      refused += 1
      message = str(error)
      assert str(path) in message and "; valid: " in message
      assert "\n" not in message and len(message) < 700
    else:
      file.verify()
  assert refused > 0.8 * len(texts)
  assert time.monotonic() - start < 20


def test_ids_and_layers_outside_the_file_are_refused(written):
  file = RowFile(written[0])
  rows = file.header.num_rows[14]
  for wrong in (-1, rows, 2**40):
    with pytest.raises(
      InputError, match=rf"row_ids\[14\]: {wrong}; valid: 0 <"
    ):
      read(file, 14, [0, wrong])
  with pytest.raises(InputError, match=r"layer: 2; valid: one of \[1, 14\]"):
    read(file, 2, [0])


def test_threads_read_at_once(written):
  path, rows = written
  file, wrong = RowFile(path), []

  def work(seed):
    random = np.random.default_rng(seed)
    for _ in range(50):
      for layer, expected in rows.items():
        ids = random.integers(0, len(expected), 200)
        if (read(file, layer, ids) != expected[ids]).any():
          wrong.append(seed)

  threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong


def test_processes_share_one_file(written):
  path, rows = written
  file = RowFile(path)
  program = (
    "import sys, numpy as np, zlib\n"
    "from engram_jax.stores.row_files import RowFile\n"
    "out = np.empty((9, 264), np.uint8)\n"
    "RowFile(sys.argv[1]).read(14, np.arange(9), out)\n"
    "print(zlib.crc32(out))\n"
  )
  command = [sys.executable, "-c", program, str(path)]
  root = pathlib.Path(__file__).parents[2]
  found = subprocess.run(
    command, capture_output=True, text=True, cwd=root, timeout=120
  )
  assert int(found.stdout) == zlib.crc32(read(file, 14, range(9)))
  np.testing.assert_array_equal(read(file, 14, range(9)), rows[14][:9])
  # Read-only and shared: the page cache's own pages.
  maps = pathlib.Path("/proc/self/maps")
  if maps.exists():
    mapped = [x for x in maps.read_text().splitlines() if str(path) in x]
    assert mapped and all(x.split()[1] == "r--s" for x in mapped)


def resident():
  """Bytes of this process in memory."""
  pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
  return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="Linux only")
def test_a_file_of_200_gb_opens_at_once_and_reads_pages(tmp_path):
  # V4.1's: two layers of fp8 rows; zeros, of which the disk holds none.
  header = Header(FP8, {1: 384_006_168, 14: 384_016_682})
  path = tmp_path / "rows"
  path.write_bytes(header.encode())
  os.truncate(path, header.file_bytes)
  assert header.file_bytes > 200e9
  start, before = time.monotonic(), resident()
  file = RowFile(path)
  assert time.monotonic() - start < 0.5
  assert os.stat(path).st_blocks * 512 < 2**20
  # A row of the last page, written where the header says it starts.
  last = header.num_rows[14] - 1
  at = header.starts()[14] + last // 15 * 4096 + last % 15 * 264
  with open(path, "r+b") as disk:
    disk.seek(at)
    disk.write(bytes(range(200)))
  ids = np.linspace(0, last, 2000).astype(np.int64)
  found = read(file, 14, ids)
  assert ids[-1] == last and not found[:-1].any()
  assert found[-1, :200].tolist() == list(range(200))
  # 2000 pages are 8 MB; some systems map a few neighbours that they have.
  assert resident() - before < 64e6
