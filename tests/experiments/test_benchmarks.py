"""The benchmarks run at tiny sizes and say what they should; no time is judged.

Their comparisons are only worth something if both sides compute the same.
"""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.errors import InputError
from engram_jax.memory.hashing import NgramHash
from experiments.benchmarks import (
  convolution,
  engram_lines,
  engram_module,
  harness,
  hash,
  scaling_runs,
  table_scaling,
)

TIMES = {"median_ms", "min_ms", "first_s"}
LAYER_SIZES = dict(
  hidden_size=8,
  streams=2,
  heads=2,
  head_dim=4,
  batch=2,
  length=16,
  vocab_size=64,
)
MODEL_SIZES = dict(
  hidden_size=16, heads=2, head_dim=4, batch=2, length=16, vocab_size=64
)


# --- harness ---


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
  if harness._proc("/proc/meminfo", "MemAvailable") is None:
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


def test_child_measures_and_tells_its_peak():
  answer = harness.in_child(
    "experiments.benchmarks.convolution:measure",
    batch=1,
    length=8,
    streams=1,
    hidden_size=4,
    taps=2,
    dilation=1,
    repeats=1,
  )
  assert set(answer) == {"records", "ratio", "difference", "peak_mib"}
  assert 10 < answer["peak_mib"] < 10_000


def test_child_refuses_as_its_parent_would():
  with pytest.raises(InputError, match=r"^lines: nothing; valid: of forward"):
    harness.in_child(
      "experiments.benchmarks.engram_module:measure",
      rows_per_head=[11],
      lines=["nothing"],
      repeats=1,
    )


def test_child_that_fails_says_why():
  with pytest.raises(RuntimeError, match="no_such_module"):
    harness.in_child("no_such_module:measure")


# --- hash ---


def test_hash():
  cases = {"two": (1000, (101, 211)), "three": (1000, (101, 101, 101))}
  records = hash.measure(cases, tokens=[64, 128], repeats=1, length=32)
  assert [(r["case"], r["columns"], r["tokens"]) for r in records] == [
    ("two", 16, 64),
    ("two", 16, 128),
    ("three", 24, 64),
    ("three", 24, 128),
  ]
  forms = {"jnp", "numpy", "numpy_loop"}
  for record in records:
    assert set(record["ns_per_token"]) == forms
    assert set(record["min_ns_per_token"]) == forms
    assert record["reached"] == (record["ratio"] >= hash.TARGET)


def test_loop_over_heads_is_the_hash():
  hashing = NgramHash.create(
    vocab_size=1000, rows_per_head=(101, 211), heads=3, layers=(1,), pad_id=2
  )
  ids = np.random.default_rng(0).integers(0, 1000, (3, 16))
  np.testing.assert_array_equal(
    hash.loop_over_heads(hashing, ids), hashing.row_ids_numpy(ids, 1)
  )


def test_hash_refuses_part_of_a_sequence():
  with pytest.raises(InputError, match=r"^tokens: 33; valid: a multiple of"):
    cases = {"demo": (1000, (101, 211))}
    hash.measure(cases, tokens=[33], repeats=1, length=32)


# --- one layer ---


def test_engram_module():
  answer = engram_module.measure([11], sizes=LAYER_SIZES, repeats=1)
  records = answer["records"]
  assert [r["line"] for r in records] == list(engram_lines.LINES)
  assert all(set(r) == TIMES | {"line", "rows", "table_mib"} for r in records)
  assert json.loads(json.dumps(answer)) == answer


def test_engram_module_has_each_line_at_each_size():
  lines = ["hash", "row optimizer"]
  answer = engram_module.measure(
    [11, 101], lines=lines, sizes=LAYER_SIZES, repeats=1
  )
  sizes = engram_lines.Sizes(**LAYER_SIZES)
  rows = [engram_lines.Layer(n, sizes).num_rows for n in (11, 101)]
  found = [(r["line"], r["rows"]) for r in answer["records"]]
  assert found == [(line, n) for line in lines for n in rows]


def test_a_forward_pass_holds_no_moments():
  layer = engram_lines.Layer(11, engram_lines.Sizes(**LAYER_SIZES))
  layer.runs("forward")()
  assert set(layer.arrays) == {"table", "params", "hidden", "tokens"}


def test_rows_and_table_give_the_same_gradients():
  layer = engram_lines.Layer(11, engram_lines.Sizes(**LAYER_SIZES))
  (loss, by), _ = layer.runs("forward + backward")()
  (dense_loss, dense_by), _ = layer.runs("forward + backward, dense")()
  assert float(loss) == pytest.approx(float(dense_loss))
  ids = layer.row_ids(layer["tokens"])
  by_table = jnp.zeros_like(layer["table"]).at[ids].add(by[2])
  for found, expected in zip(
    jax.tree.leaves((by[0], by[1], by_table)), jax.tree.leaves(dense_by)
  ):
    scale = float(jnp.max(jnp.abs(expected)))
    np.testing.assert_allclose(found, expected, atol=1e-5 * scale + 1e-12)

  gradients, _ = layer.runs("rows' gradient")()
  by_table, _ = layer.runs("table's gradient")()
  found = jnp.zeros_like(by_table)
  found = found.at[gradients.row_ids].add(gradients.values, mode="drop")
  np.testing.assert_allclose(found, by_table, rtol=1e-5)


def test_convolutions_agree():
  answer = convolution.measure(
    batch=2,
    length=12,
    streams=2,
    hidden_size=4,
    taps=4,
    dilation=3,
    repeats=1,
  )
  assert answer["difference"] < 1e-5
  assert set(answer["ratio"]) == set(convolution.PASSES)
  assert len(answer["records"]) == 4


# --- table scaling ---


def test_table_scaling():
  runs = [("sparse", 100), ("memory", 200)]
  answer = table_scaling.measure(runs, sizes=MODEL_SIZES, repeats=1)
  records = answer["records"]
  assert [r["form"] for r in records] == ["sparse", "memory"]
  assert 100 <= records[0]["rows"] < 200 <= records[1]["rows"]
  keys = TIMES | {"form", "rows", "table_mib", "loss"}
  assert all(set(record) == keys for record in records)
  assert json.loads(json.dumps(answer)) == answer


@pytest.mark.parametrize(
  "run, message",
  [
    (("other", 100), "form: other; valid: one of sparse, memory, dense"),
    (("sparse", 7), "rows: 7; valid: at least 8, two a head"),
    (("sparse", 10**15), "rows: .*; valid: what fits in"),
  ],
)
def test_table_scaling_refuses(run, message):
  with pytest.raises(InputError, match=f"^{message}"):
    table_scaling.measure([run], sizes=MODEL_SIZES, repeats=1)


def test_sparse_and_dense_steps_start_alike():
  sizes = {**scaling_runs.DEFAULTS, **MODEL_SIZES}
  found = {}
  for form in ("sparse", "dense"):
    program = scaling_runs.program(100, sizes)
    state = scaling_runs.make_state(program, form)
    # The moments as a run has them at its start.
    states = jax.tree.map(jnp.zeros_like, state.table_states)
    state = dataclasses.replace(state, table_states=states)
    step = scaling_runs._STEPS[form](program)
    (batch,) = scaling_runs.make_batches(sizes, 1)
    found[form] = step(state, batch)
  (sparse, by_rows), (dense, by_table) = found["sparse"], found["dense"]
  for name in ("loss", "grad_norm"):
    np.testing.assert_allclose(by_rows[name], by_table[name], rtol=1e-5)
  # One step moves an entry by its rate at most, whatever the gradient's size:
  # tolerate what rounding does to the smallest ones.
  rate = 4e-4 * 5
  table, dense_table = sparse.tables[1], dense.tables[1]
  assert float(jnp.max(jnp.abs(table - 1e-3))) > 0.5 * rate
  np.testing.assert_allclose(table, dense_table, atol=0.01 * rate)
  for a, b in zip(
    jax.tree.leaves(sparse.params), jax.tree.leaves(dense.params)
  ):
    np.testing.assert_allclose(a, b, atol=0.1 * 4e-4)


def test_verdict():
  def line(form, table_mib, peak_mib):
    return {"form": form, "table_mib": table_mib, "peak_mib": peak_mib}

  lines = [
    line("sparse", 1, 100),
    line("sparse", 50, 240),
    line("dense", 1, 900),
  ]
  pairs = [
    {"name": "step", "ratio": 1.5},
    {"name": "step", "ratio": 1.1},
    {"name": "memory", "ratio": 1.3},
    {"name": "dense", "ratio": 9.0},
  ]
  assert table_scaling.verdict(lines, pairs) == {
    "step_ratio": 1.1,
    "step_ratio_at_most": 1.2,
    "step_reached": True,
    "memory_alone_ratio": 1.3,
    "peak_mib": 240,
    "peak_mib_at_most": 250,
    "peak_reached": True,
  }
  lines[1]["peak_mib"], pairs[1]["ratio"] = 251, 1.21
  verdict = table_scaling.verdict(lines, pairs)
  assert not verdict["step_reached"] and not verdict["peak_reached"]


# --- as programs ---


def program(name, *flags):
  return subprocess.run(
    [sys.executable, "-m", f"experiments.benchmarks.{name}", *flags],
    cwd=harness.ROOT,
    capture_output=True,
    text=True,
  )


def test_program_prints_a_table_and_writes_json(tmp_path):
  out = tmp_path / "deep" / "hash.json"
  flags = ["--tokens=32", "--length=32", "--repeats=1", f"--out={out}"]
  done = program("hash", *flags)
  assert done.returncode == 0, done.stderr
  assert "numpy_loop" in done.stdout and str(out) in done.stdout
  result = json.loads(out.read_text())
  assert [p.name for p in out.parent.iterdir()] == ["hash.json"]
  command = " ".join(["python -m experiments.benchmarks.hash", *flags])
  assert result["command"] == command
  assert len(result["records"]) == len(hash.CASES)
  assert {"python", "versions", "cpu", "commit"} <= set(result["environment"])


def test_program_refuses_in_one_line(tmp_path):
  done = program("table_scaling", "--rows=5", f"--out={tmp_path}/x.json")
  assert done.returncode == 2
  assert done.stderr.strip().splitlines()[-1] == (
    "error: rows: [5]; valid: two or more numbers, ascending"
  )
  assert not list(tmp_path.iterdir())
