"""The benchmarks of rows outside the device, at tiny sizes; no time judged."""

import dataclasses
import itertools

import numpy as np
import pytest

from engram_jax.analysis.accounting import counting_hash
from engram_jax.decoding.decoders import TableDecoder
from engram_jax.errors import InputError
from engram_jax.memory.prefetch import row_ids_on_host
from engram_jax.memory.quantization import RowFormat
from experiments.benchmarks import larger_than_memory, offload, offload_runs
from tests.experiments.micro import experiment

PROMPTS = dict(prompts=4, shortest=3, longest=9, batch=2, new_tokens=3)


pytestmark = pytest.mark.usefixtures("steps_compile_fast")


def micro():
  return experiment().model


@pytest.fixture(scope="module")
def subject():
  return offload_runs.make_subject(micro(), **PROMPTS)


@pytest.fixture(scope="module")
def row_format():
  return RowFormat("int8", micro().engram.head_dim)


@pytest.fixture(scope="module")
def packed(subject, row_format):
  return offload_runs.make_rows(subject.hashing.num_rows, row_format)


def test_prompts_are_those_asked_for(subject):
  lengths = np.concatenate([lengths for _, lengths in subject.batches])
  assert len(subject.batches) == 2 and len(lengths) == 4
  assert lengths.min() >= 3 and lengths.max() <= 9
  assert subject.prompt_tokens == lengths.sum()
  for field, value in (("prompts", 3), ("shortest", 10)):
    with pytest.raises(InputError, match=f"^{field}: {value}; valid: "):
      offload_runs.make_subject(micro(), **PROMPTS | {field: value})


@pytest.mark.parametrize("as_packed", [False, True])
def test_every_figure_is_there(
  subject, packed, row_format, tmp_path, as_packed
):
  result = offload.measure(
    subject,
    packed,
    row_format,
    tmp_path,
    repeats=1,
    delays_ms=[0.0, 5.0],
    as_packed=as_packed,
  )
  assert result["left_out"] == {}
  cases = result["cases"]
  assert list(cases) == [
    "resident",
    "host",
    "host, prefetch",
    "pinned",
    "pinned, prefetch",
    "file",
    "file, prefetch",
  ]
  assert cases["resident"]["decode_ratio"] == 1
  assert [point["delay_ms"] for point in result["latency"]] == [0, 5]
  each = result["per_token"]["decode"]
  assert 0 < each["rows_read"] <= each["rows_asked"]
  assert each["bytes_read"] == each["rows_read"] * row_format.bytes_per_row
  result["memory"] = {}
  text = "\n\n".join(offload.tables_of(result))
  assert "host, decode" in text and "file, prefetch" in text
  offload.plot(result, tmp_path / "offload.png")
  assert (tmp_path / "offload.png").stat().st_size > 10_000


def test_other_tokens_are_an_error(subject, packed, row_format):
  parts = subject.hashing, subject.compression
  tables = offload_runs.to_tables(packed, row_format)
  # The head is small: rows this loud change what is drawn.
  wrong = {i: 100 * table[::-1] for i, table in tables.items()}
  decoders = {
    name: TableDecoder(subject.model, rows, *parts)
    for name, rows in (("one", tables), ("other", wrong))
  }
  with pytest.raises(RuntimeError, match=r"^other: other tokens than one$"):
    offload_runs.in_turns(subject, decoders, repeats=1)


def test_hidden_is_the_share_that_made_no_step_longer():
  resident = {"decode_ms": 10.0}
  for more, share in ((0, 1), (2, 0.5), (4, 0), (-1, 1.25)):
    case = {"decode_ms": 10.0 + more}
    assert offload.hidden(case, resident, "decode", 4.0) == share


@pytest.fixture
def large():
  """A model with more rows than the file's pool has different ones."""
  row_format = RowFormat("int8", 8)
  return offload_runs.with_memory_of(micro(), 2**-8, row_format), row_format


def test_a_memory_of_so_many_bytes(large):
  model, row_format = large
  rows = sum(counting_hash(model).num_rows.values())
  assert rows * row_format.bytes_per_row == pytest.approx(2**22, rel=0.02)
  with pytest.raises(InputError, match=r"^gib: 1e-08; valid: "):
    offload_runs.with_memory_of(micro(), 1e-8, RowFormat("int8", 8))


def test_throughput_against_the_cache(large, tmp_path):
  model, row_format = large
  hashing = counting_hash(model)
  path = tmp_path / "rows"
  file, seconds = larger_than_memory.make_file(path, hashing, row_format)
  assert seconds > 0
  file, seconds = larger_than_memory.make_file(path, hashing, row_format)
  assert seconds is None
  file.verify()
  subject = offload_runs.make_subject(model, **PROMPTS)
  few = counting_hash(offload_runs.with_rows(model, 100))
  tables = offload_runs.make_rows(few.num_rows, row_format)
  tables = offload_runs.to_tables(tables, row_format)
  parts = few, subject.compression
  resident = TableDecoder(subject.model, tables, *parts)
  rng = np.random.default_rng(0)
  text = rng.integers(1, model.vocab_size, (2, 12)).astype(np.int32)
  result = larger_than_memory.measure(
    subject,
    resident,
    file,
    text,
    caches_mib=[0, 1],
    prompt=4,
    before=4,
  )
  none, some = result["caches"]
  ids = row_ids_on_host(hashing, text[:1, :1])
  asked = sum(x.size for x in ids.values())
  assert none["cold"]["rows_read_per_token"] <= asked
  both = itertools.product((none, some), ("cold", "warm"))
  assert all(point[name]["tokens_per_s"] > 0 for point, name in both)
  assert 0 <= some["warm"]["hit_rate"] <= 1
  about = dict(file_gib=1.0, machine_gib=1.0)
  larger_than_memory.plot({**result, **about}, tmp_path / "plot.png")
  assert "hit rate" in larger_than_memory.table_of(result)


def test_a_foreign_file_is_refused(large, tmp_path):
  model, row_format = large
  hashing = counting_hash(model)
  rows = {
    layer: np.zeros((count, row_format.bytes_per_row), np.uint8)
    for layer, count in hashing.num_rows.items()
  }
  offload_runs.write_rows(tmp_path / "rows", rows, hashing, row_format)
  with pytest.raises(InputError, match=r"^file: .*; valid: one that this"):
    larger_than_memory.make_file(tmp_path / "rows", hashing, row_format)
  other = dataclasses.replace(
    model, engram=dataclasses.replace(model.engram, seed=5)
  )
  with pytest.raises(InputError, match=r"^hash"):
    larger_than_memory.make_file(
      tmp_path / "rows", counting_hash(other), row_format
    )
