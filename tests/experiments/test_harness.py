"""What the benchmarks share: turns, children, memory, tables, programs."""

import json
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import pytest

from engram_jax.errors import InputError
from experiments.benchmarks import (
  harness,
  hash,
  larger_than_memory,
  offload,
)

TIMES = {"median_ms", "min_ms", "first_s"}


def test_contenders_take_turns():
  calls = []
  cases = {name: lambda name=name: calls.append(name) for name in "ab"}
  times = harness.interleaved(cases, repeats=3, warmup=2)
  assert calls == ["a", "b"] * 5
  assert set(times) == {"a", "b"}
  assert all(set(taken) == TIMES for taken in times.values())
  assert all(t["min_ms"] <= t["median_ms"] for t in times.values())


@pytest.mark.parametrize("name", ["repeats", "warmup"])
def test_nothing_to_time_is_refused(name):
  options = {"repeats": 1, "warmup": 1, name: 0}
  with pytest.raises(InputError, match=f"^{name}: 0; valid: an integer >= 1"):
    harness.interleaved({}, **options)


def test_too_much_memory_is_refused():
  harness.require_memory("rows", 1, -harness.RESERVE)
  if not pathlib.Path("/proc/meminfo").exists():
    pytest.skip("this system does not tell how much memory is free")
  with pytest.raises(InputError, match=r"^rows: 7; valid: what fits in .* GiB"):
    harness.require_memory("rows", 7, 2**60)


def test_resident_writes_in_place_and_leaves_integers():
  tree = {"x": jnp.zeros((64, 64)), "n": jnp.arange(3)}
  pointer = tree["x"].unsafe_buffer_pointer()
  moved = harness.resident(tree)
  assert moved["x"].unsafe_buffer_pointer() == pointer
  assert float(moved["x"].min()) == pytest.approx(1e-3)
  assert moved["n"].tolist() == [0, 1, 2]


def test_aligned_table():
  rows = [("one", 1000, 0.12345, None), ("three", 2, 1234.5, True)]
  assert harness.aligned(("", "rows", "ms", "x"), rows).splitlines() == [
    "        rows     ms     x",
    "-------------------------",
    "one    1,000  0.123     -",
    "three      2  1,234  True",
  ]


def test_table_of_records():
  records = [{"a": {"b": 1}, "c": 2.0}, {"c": 3.0}]
  columns = {"x": "a.b", "twice": lambda r: 2 * r["c"]}
  assert harness.table(columns, records, title="of two").splitlines() == [
    "of two",
    "x  twice",
    "--------",
    "1      4",
    "-      6",
  ]
  assert harness.table(["c"], records).splitlines() == ["c", "-", "2", "3"]
  found = [harness.scaled("a.b", 4)(record) for record in records]
  assert found == [0.25, None]


def test_targets_are_told():
  targets = {
    "ratio": harness.target(1.3, at_most=1.2),
    "share": harness.target(0.9, at_least=0.5),
  }
  assert [one["reached"] for one in targets.values()] == [False, True]
  assert harness.verdict(targets) == [
    "ratio: 1.3, to be at most 1.2: MISSED\n"
    "share: 0.9, to be at least 0.5: reached"
  ]
  assert harness.verdict({}) == []


# --- children ---

HASH = dict(tokens=[32], length=32, repeats=1)


def test_child_measures_and_tells_its_peak():
  answer = harness.in_child(hash.measure, **HASH)
  assert set(answer) == {"targets", "records", "peak_mib"}
  assert 10 < answer["peak_mib"] < 10_000


def test_child_refuses_as_its_parent_would():
  with pytest.raises(InputError, match=r"^tokens: 33; valid: a multiple of"):
    harness.in_child(hash.measure, **HASH | {"tokens": [33]})


def test_child_that_fails_says_why():
  with pytest.raises(RuntimeError, match="no_such_argument"):
    harness.in_child(hash.measure, no_such_argument=1)


def test_number_of_simulated_devices(monkeypatch):
  name = "--xla_force_host_platform_device_count"
  monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=x {name}=3")
  env = harness.simulated_devices(4)
  assert env["XLA_FLAGS"] == f"--xla_dump_to=x {name}=4"
  with pytest.raises(InputError, match=r"^devices: 0; valid: an integer >= 1"):
    harness.simulated_devices(0)


# --- as programs ---


def test_program_prints_a_table_and_writes_json(program, tmp_path):
  out = tmp_path / "deep" / "hash.json"
  flags = ["--tokens=32", "--length=32", "--repeats=1", f"--out={out}"]
  done = program("benchmarks.hash", *flags, configured=False)
  assert done.returncode == 0, done.stderr
  assert "numpy_loop" in done.stdout and str(out) in done.stdout
  assert "least ratio: " in done.stdout
  result = json.loads(out.read_text())
  assert [p.name for p in out.parent.iterdir()] == ["hash.json"]
  command = " ".join(["python -m experiments.benchmarks.hash", *flags])
  assert result["command"] == command
  assert result["config"] == {"tokens": [32], "length": 32, "repeats": 1}
  assert result["seed"] == harness.SEED
  assert len(result["records"]) == len(hash.CASES)
  assert {"python", "versions", "cpu", "commit"} <= set(result["environment"])


def test_flags_are_read_by_the_kind_of_their_default(tmp_path):
  code = """
import sys
from experiments.benchmarks import harness

def measure(**config):
  return {"targets": {"x": harness.target(1.0, at_most=2.0)}}

flags = {"words": (["a"], "."), "rates": ([1.0], "."), "on": (False, ".")}
benchmark = harness.Benchmark(measure, lambda result: ["table"], flags)
sys.modules["__main__"].__spec__ = sys.modules["json"].__spec__
harness.run(benchmark)
"""
  found = {}
  for name, given in {
    "default": [],
    "given": ["--words=a,b", "--words=c", "--rates=2,3"],
    "other": ["--on", "--rates=4", "--words="],
  }.items():
    out = tmp_path / f"{name}.json"
    command = [sys.executable, "-c", code, *given, f"--out={out}"]
    done = subprocess.run(
      command, cwd=harness.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "x: 1, to be at most 2: reached" in done.stdout
    found[name] = json.loads(out.read_text())["config"]
  assert found == {
    "default": {"words": ["a"], "rates": [1.0], "on": False},
    "given": {"words": ["a", "b", "c"], "rates": [2.0, 3.0], "on": False},
    "other": {"words": [], "rates": [4.0], "on": True},
  }


@pytest.mark.parametrize(
  "name, flags, message",
  [
    (
      "table_scaling",
      ["--rows=5,b"],
      "rows: 5,b; valid: integers separated by commas",
    ),
    (
      "offload",
      ["--delays_ms="],
      "delays_ms: none; valid: one or more latencies",
    ),
    (
      "table_scaling",
      ["--rows=5"],
      "rows: [5]; valid: two or more numbers, ascending",
    ),
    (
      "table_scaling",
      ["--devices=8", "--dense_rows=100"],
      "dense_rows: 100; valid: none with devices: the smallest table is "
      "compared with",
    ),
    (
      "table_scaling",
      ["--devices=3", "--dense_rows="],
      "batch: 8; valid: a multiple of devices = 3",
    ),
    ("hash", ["--out=/proc"], "out: /proc; valid: a file: this is a folder"),
    (
      "offload",
      ["--preset=tiny", "--row_format=int8", "--prompts=3"],
      "prompts: 3; valid: a multiple of the batch, 8",
    ),
  ],
)
def test_programs_refuse_in_one_line(program, name, flags, message, tmp_path):
  out = f"--out={tmp_path}/x.json"
  done = program(f"benchmarks.{name}", out, *flags, configured=False)
  assert done.returncode == 2, done.stderr
  assert done.stderr.strip().splitlines()[-1] == f"error: {message}"
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "name, benchmark",
  [
    ("offload", offload),
    ("offload_higher", offload),
    ("larger_than_memory", larger_than_memory),
  ],
)
def test_pictures_are_made_of_committed_results(name, benchmark, tmp_path):
  result = json.loads((harness.RESULTS / f"{name}.json").read_text())
  harness.draw(benchmark.PICTURE, result, tmp_path / "x.json")
  assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
