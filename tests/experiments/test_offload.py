"""The benchmarks of rows outside the device, at tiny sizes; no time judged."""

import dataclasses
import pathlib
import time

import numpy as np
import pytest

from engram_jax.analysis.accounting import counting_hash
from engram_jax.decoding.decoders import Decoder
from engram_jax.errors import InputError
from engram_jax.stores.host_stores import FileStore, HostStore
from engram_jax.stores.prefetch import row_ids_on_host
from engram_jax.stores.program_stores import DeviceStore, TableStore
from engram_jax.stores.quantization import RowFormat
from engram_jax.stores.row_file_headers import Header
from engram_jax.stores.row_files import write_row_file
from experiments.benchmarks import (
  fixtures,
  harness,
  larger_than_memory,
  offload,
)
from tests.experiments.micro import experiment

PROMPTS = dict(prompts=4, shortest=3, longest=9, batch=2, new_tokens=3)


pytestmark = pytest.mark.usefixtures("steps_compile_fast")


def micro():
  return experiment().model


@pytest.fixture(scope="module")
def subject():
  return offload.make_subject(micro(), **PROMPTS)


@pytest.fixture(scope="module")
def row_format():
  return RowFormat("int8", micro().engram.head_dim)


def test_prompts_are_those_asked_for(subject):
  lengths = np.concatenate([lengths for _, lengths in subject.batches])
  assert len(subject.batches) == 2 and len(lengths) == 4
  assert lengths.min() >= 3 and lengths.max() <= 9
  for field, value in (("prompts", 3), ("shortest", 10)):
    with pytest.raises(InputError, match=f"^{field}: {value}; valid: "):
      offload.make_subject(micro(), **PROMPTS | {field: value})


@pytest.mark.parametrize("packed", [False, True])
def test_every_figure_is_there(subject, row_format, tmp_path, packed):
  result = offload.compare(
    subject,
    row_format,
    tmp_path,
    repeats=1,
    delays_ms=[0.0, 5.0],
    packed=packed,
  )
  assert result["left_out"] == {}
  cases = result["cases"]
  assert list(cases) == [
    "resident",
    "host",
    "host, prefetch",
    "file",
    "file, prefetch",
    "pinned",
    "pinned, prefetch",
  ]
  assert cases["resident"]["decode_ratio"] == 1
  assert [point["delay_ms"] for point in result["latency"]] == [0, 5]
  assert set(result["targets"]) == {
    f"{location}, {phase}"
    for location in ("host", "file")
    for phase in ("prefill", "decode")
  }
  text = "\n\n".join(offload.tables(result))
  assert "file, prefetch" in text and "latency, ms" in text
  harness.draw(offload.PICTURE, result, tmp_path / "offload.json")
  assert (tmp_path / "offload.png").stat().st_size > 10_000


def test_other_tokens_are_an_error(subject, row_format):
  rows = fixtures.make_rows(subject.memory.num_rows, row_format)
  tables = fixtures.to_tables(rows, row_format)
  # The head is small: rows this loud change what is drawn.
  wrong = {i: 100 * table[::-1] for i, table in tables.items()}
  decoders = {
    name: Decoder(subject.model, subject.memory, TableStore(rows))
    for name, rows in (("one", tables), ("other", wrong))
  }
  with pytest.raises(RuntimeError, match=r"^other: other tokens than one$"):
    offload.in_turns(subject, decoders, repeats=1)


@pytest.fixture
def large():
  """A model with more rows than the file's pool has different ones."""
  row_format = RowFormat("int8", 8)
  return fixtures.with_memory_of(micro(), 2**-8, row_format), row_format


def test_a_memory_of_so_many_bytes(large):
  model, row_format = large
  rows = sum(counting_hash(model).num_rows.values())
  assert rows * row_format.bytes_per_row == pytest.approx(2**22, rel=0.02)
  with pytest.raises(InputError, match=r"^gib: 1e-08; valid: "):
    fixtures.with_memory_of(micro(), 1e-8, RowFormat("int8", 8))


def test_throughput_against_the_cache(large, tmp_path):
  model, row_format = large
  hashing, path = counting_hash(model), tmp_path / "rows"
  made = fixtures.make_row_file(path, hashing, row_format)
  written = path.stat()
  made.verify()
  fixtures.make_row_file(path, hashing, row_format)  # is not made again
  assert path.stat().st_mtime_ns == written.st_mtime_ns
  rng = np.random.default_rng(0)
  text = rng.integers(1, model.vocab_size, (2, 12)).astype(np.int32)
  result = larger_than_memory.compare(
    model, path, text, caches_mib=[0, 1], prompt=4, before=4, few=100
  )
  none, some = result["caches"]
  ids = row_ids_on_host(hashing, text[:1, :1])
  asked = sum(x.size for x in ids.values())
  for name in larger_than_memory.RUNS:
    assert 0 < none[name]["rows_read_per_token"] <= asked
    assert min(none[name]["tokens_per_s"], some[name]["tokens_per_s"]) > 0
    assert 0 <= some[name]["hit_rate"] <= 1
  about = dict(file_gib=1.0, machine_gib=1.0, anonymous_mib=1.0, mapped_mib=1.0)
  result |= about
  harness.draw(larger_than_memory.PICTURE, result, tmp_path / "plot.json")
  assert (tmp_path / "plot.png").stat().st_size > 10_000
  assert "hit rate" in "\n".join(larger_than_memory.tables(result))


def test_a_foreign_file_is_refused(large, tmp_path):
  model, row_format = large
  hashing = counting_hash(model)
  rows = {
    layer: np.zeros((count, row_format.bytes_per_row), np.uint8)
    for layer, count in hashing.num_rows.items()
  }
  header = Header(row_format, hashing.num_rows, hashing)
  path = tmp_path / "rows"
  write_row_file(path, {i: [x] for i, x in rows.items()}, header)
  with pytest.raises(InputError, match=r"^file: .*; valid: one that this"):
    fixtures.make_row_file(path, hashing, row_format)
  other = dataclasses.replace(
    model, engram=dataclasses.replace(model.engram, seed=5)
  )
  with pytest.raises(InputError, match=r"^hash"):
    fixtures.make_row_file(path, counting_hash(other), row_format)


# --- fixtures ---


def test_a_slow_store_reads_the_same_later(row_format):
  packed = fixtures.make_rows({1: 50}, row_format)
  ids = {1: np.array([[3, 9], [9, 40]])}
  store = HostStore(packed, row_format)
  slow = fixtures.SlowStore(store, delay_s=0.05)
  start = time.monotonic()
  found = slow.read(ids)
  assert time.monotonic() - start >= 0.05
  np.testing.assert_array_equal(found.packed[1], store.read(ids).packed[1])
  assert slow.statistics == store.statistics and slow.statistics.reads == 2
  assert slow.layers == store.layers and slow.num_rows == store.num_rows
  for wrong in (-1.0, float("nan")):
    with pytest.raises(InputError, match=f"delay_s: {wrong}"):
      fixtures.SlowStore(store, delay_s=wrong)
  with pytest.raises(InputError, match=r"^store: DeviceStore; valid: a Host"):
    fixtures.SlowStore(DeviceStore(packed, row_format), delay_s=1.0)


@pytest.mark.skipif(
  not pathlib.Path("/proc/self/smaps").exists(), reason="asks Linux"
)
def test_pages_of_a_store_are_forgotten(large, tmp_path):
  model, row_format = large
  path = tmp_path / "rows"
  store = FileStore(
    fixtures.make_row_file(path, counting_hash(model), row_format)
  )
  ids = {1: np.arange(5000)}

  def mapped_kib():
    text = pathlib.Path("/proc/self/smaps").read_text()
    return sum(
      int(part.split("Rss:")[1].split()[0])
      for part in text.split("VmFlags:")
      if str(path) in part
    )

  before = store.read(ids).packed[1]
  assert mapped_kib() > 0
  fixtures.forget_pages(store)
  assert mapped_kib() == 0
  np.testing.assert_array_equal(store.read(ids).packed[1], before)
