"""The benchmarks of whole training steps, at tiny sizes; no time is judged."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from engram_jax.analysis import hlo
from engram_jax.errors import InputError
from engram_jax.presets import Preset, preset
from experiments.benchmarks import (
  compile_time,
  harness,
  long_sequence,
  moe_against_dense,
  step_profile,
)
from tests.experiments.micro import experiment

TIMES = {"median_ms", "min_ms", "first_s"}
CHUNKS = dict(block_size=8, loss_chunk=16)


pytestmark = pytest.mark.usefixtures("steps_compile_fast")


def micro(name=""):
  """The smallest model, as a preset."""
  config = experiment()
  return Preset(config.model, config.train, config.mesh, "", ())


def plain_micro(name=""):
  """The same without memory and experts."""
  found = micro()
  model = dataclasses.replace(found.model, moe=None, engram=None)
  return dataclasses.replace(found, model=model)


#: A program whose children answer at once, with what they were asked.
PROGRAM = """
from experiments.benchmarks import {name} as benchmark, harness
from tests.experiments.test_step_benchmarks import ANSWERS

def in_child(function, *, env=None, **arguments):
  return {{**ANSWERS[benchmark.__name__](arguments), "peak_mib": 100.0}}

harness.in_child = in_child
harness.launch(benchmark.define_flags, benchmark.main)
"""


def answer_of_long_sequence(asked):
  length, plain = asked["length"], asked["form"] == "plain"
  answer = {"compile_s": 1.0, "state_mib": 9.0, "temp_mib": float(length)}
  if plain and length > 100:
    return {**answer, "refused_by": "length: too long"}
  return {**answer, "step_s": length / 8, "loss": 2.0, "grad_norm": 1.0}


def answer_of_moe_against_dense(asked):
  records = [
    {"model": name, "tokens_per_s": 100.0 / (1 + i)}
    | dict.fromkeys(("activated", "total"), 7)
    | dict.fromkeys((*TIMES, "gflops", "gflops_per_s", "dropped"), 1.0)
    for i, name in enumerate(asked["names"])
  ]
  group = {"dot": {"ms": 2.0}}
  profile = {"step_ms": 2.0, "parts": {"routing": {"ms": 2.0}}, "kinds": group}
  profiles = dict.fromkeys(asked.get("profiled", ()), profile)
  return {"records": records, "profiles": profiles}


def answer_of_compile_time(asked):
  slow = asked["layers"] if asked["form"] == "unrolled" else 2
  names = ("lowered_operations", "instructions", "temp_mib")
  return dict.fromkeys((*compile_time.SECONDS, *names), slow)


ANSWERS = {
  f"experiments.benchmarks.{name.removeprefix('answer_of_')}": function
  for name, function in list(globals().items())
  if name.startswith("answer_of_")
}


def program(name, *flags):
  return subprocess.run(
    [sys.executable, "-c", PROGRAM.format(name=name), *flags],
    cwd=harness.ROOT,
    capture_output=True,
    text=True,
  )


# --- compile time ---


def test_memory_sits_where_the_papers_does():
  model = preset("engram_27b").model
  assert compile_time.with_depth(model, 30) == model
  for layers, expected in ((6, (1, 2)), (12, (1, 5))):
    found = compile_time.with_depth(model, layers)
    assert (found.num_layers, found.engram.layers) == (layers, expected)
  with pytest.raises(InputError, match=r"^layers: 5; valid: 6 or more"):
    compile_time.with_depth(model, 5)
  plain = preset("moe_27b").model
  assert compile_time.with_depth(plain, 3).num_layers == 3


def test_a_loop_is_shorter_than_its_turns(monkeypatch):
  monkeypatch.setattr(compile_time, "find_preset", plain_micro)
  options = dict(preset="", layers=4, batch=1, length=8)
  scanned, unrolled = (
    compile_time.measure(form=form, **options) for form in compile_time.FORMS
  )
  assert unrolled["instructions"] > 1.2 * scanned["instructions"]
  assert unrolled["lowered_operations"] > 1.2 * scanned["lowered_operations"]
  for answer in (scanned, unrolled):
    parts = [answer[name] for name in compile_time.SECONDS]
    assert sum(parts[:3]) == pytest.approx(parts[3])
  assert json.loads(json.dumps(scanned)) == scanned
  with pytest.raises(InputError, match=r"^form: x; valid: one of scanned, unr"):
    compile_time.measure(form="x", **options)


COMPILATION = dict(preset="tiny", layers=6, batch=1, length=8)


def test_compilation_is_given_up_in_time():
  found = compile_time.in_time(1, form="unrolled", **COMPILATION)
  assert found == {"finished": False}
  assert compile_time.summary([found, {"finished": True}]) == found


def test_compilation_that_fails_is_not_taken_for_slow():
  with pytest.raises(RuntimeError, match="no_such_argument"):
    compile_time.in_time(600, no_such_argument=1)


def test_summary_takes_medians():
  runs = [{"finished": True, "compile_s": s} for s in (1.0, 9.0, 2.0)]
  assert compile_time.summary(runs) == {"finished": True, "compile_s": 2.0}


# --- long sequence ---


def test_forms_compute_the_same(monkeypatch):
  monkeypatch.setattr(long_sequence, "find_preset", micro)
  plain, blockwise = (
    long_sequence.measure(preset="", length=24, form=form, **CHUNKS)
    for form in long_sequence.FORMS
  )
  assert (
    set(plain)
    == set(blockwise)
    == {
      *("loss", "grad_norm", "compile_s", "step_s"),
      *("state_mib", "temp_mib", "compiled_mib"),
    }
  )
  assert plain["loss"] == pytest.approx(blockwise["loss"], rel=1e-5)
  assert plain["grad_norm"] == pytest.approx(blockwise["grad_norm"], rel=1e-4)
  # A model that says little knows as much as nothing: ln 300.
  assert plain["loss"] == pytest.approx(5.7, abs=0.1)


def test_forms_differ_in_how_they_compute():
  found = micro()
  plain, blockwise = (
    long_sequence.in_form(form, found.model, found.train, **CHUNKS)
    for form in long_sequence.FORMS
  )
  for (model, train), block, chunk in ((plain, 0, 0), (blockwise, 8, 16)):
    assert model.attention.block_size == block
    assert model.scan_blocks == bool(block)
    assert model.remat == ("block" if block else "none")
    assert train.loss_chunk == chunk
  with pytest.raises(InputError, match=r"^form: x; valid: one of plain, block"):
    long_sequence.in_form("x", found.model, found.train, **CHUNKS)


def test_what_does_not_fit_is_not_run(monkeypatch):
  def refuse(field, value, needed):
    assert needed > 0
    raise InputError(field, value, "less")

  monkeypatch.setattr(long_sequence, "find_preset", plain_micro)
  monkeypatch.setattr(harness, "require_memory", refuse)
  found = long_sequence.measure(preset="", length=8, form="plain", **CHUNKS)
  assert found["refused_by"] == "length: 8; valid: less"
  assert found["temp_mib"] > 0 and "loss" not in found


@pytest.mark.parametrize(
  "seconds, expected",
  [
    ({2: 4.0}, 64.0),  # one alone: as the square
    ({1: 9.0, 2: 4.0, 4: 8.0}, 16.0),  # 2 L
    ({2: 2 * 2 + 4 * 3, 4: 2 * 4 + 16 * 3}, 2 * 8 + 64 * 3),
    ({2: 4.0, 4: 6.0}, 12.0),  # less than in proportion: in proportion
    ({2: 1.0, 4: 16.0}, 64.0),  # more than the square: the square
  ],
)
def test_predicted_seconds(seconds, expected):
  assert long_sequence.predicted(seconds, 8) == pytest.approx(expected)


def test_verdict_of_long_sequences():
  def line(length, **figures):
    return {"length": length, "loss": 2.0, "grad_norm": 1.0, **figures}

  lines = [
    line(2000, temp_mib=100.0, peak_mib=500.0),
    line(4000, temp_mib=180.0, peak_mib=25 * 1024),
  ]
  long_sequence.growth(lines)
  assert "mib_per_1000" not in lines[0]
  assert lines[1]["mib_per_1000"] == pytest.approx(40)
  plain = line(2000, temp_mib=400.0)
  found = long_sequence.verdict(lines, plain)
  assert found["loss_reached"] and not found["peak_reached"]
  assert (found["longest"], found["peak_gib"]) == (4000, 25)
  assert found["temp_ratio_at_compared"] == 0.25
  found = long_sequence.verdict(lines[:1], {**plain, "loss": 2.001})
  assert found["peak_reached"] and not found["loss_reached"]


# --- experts against dense ---


def test_dense_model_activates_as_much():
  every = moe_against_dense.models(preset("small").model)
  found = {
    name: moe_against_dense.counts(model)["activated_without_embedding"]
    for name, model in every.items()
  }
  dense, moe = every["dense"], every["moe"]
  assert dense.moe is None and dense.engram is None
  width = 3 * dense.hidden_size * dense.num_layers  # of one more in all blocks
  assert abs(found["dense"] - found["moe"]) <= width / 2
  blocks = moe.num_layers - moe.num_dense_layers
  for name in moe_against_dense.VARIANTS:
    more = every[name].moe.num_experts - moe.moe.num_experts
    routers = blocks * moe.hidden_size * more
    assert found[name] - found["moe"] == routers, name
  assert found["moe, memory"] > found["moe"]


def test_models_want_experts_and_memory():
  with pytest.raises(InputError, match=r"^preset: a dense model; valid: one"):
    moe_against_dense.models(preset("dense_4b").model)
  with pytest.raises(InputError, match=r"^preset: no memory; valid: a preset"):
    moe_against_dense.models(preset("moe_27b").model)


@pytest.fixture(scope="module")
def contest():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(moe_against_dense, "find_preset", micro)
    return moe_against_dense.measure(
      preset="",
      names=["dense", "moe"],
      batch=2,
      length=16,
      repeats=1,
      profiled=["moe"],
    )


def test_experts_against_dense(contest):
  assert json.loads(json.dumps(contest)) == contest
  dense, moe = contest["records"]
  for record in (dense, moe):
    assert TIMES < set(record)
    assert record["tokens_per_s"] == 32 / (record["median_ms"] / 1e3)
    assert record["loss"] == pytest.approx(5.7, abs=0.2)
  assert dense["dropped"] is None and 0 <= moe["dropped"] < 1
  assert dense["total"] == dense["activated"] < moe["total"]
  # A step multiplies by each activated weight three times, and more.
  assert dense["gflops"] > 6 * 32 * dense["activated"] / 1e9


def test_profile_tells_parts_and_kinds(contest):
  profile = contest["profiles"]["moe"]
  for group in ("parts", "kinds"):
    members = profile[group].values()
    assert sum(m["ms"] for m in members) == pytest.approx(profile["step_ms"])
    assert sum(m["share"] for m in members) == pytest.approx(1)
  assert profile["parts"].keys() >= {
    *("routing", "dispatch", "experts", "combine", "shared experts"),
    *("attention", "loss", "optimizer", "norms"),
  }
  assert profile["parts"].get("other", {"share": 0})["share"] < 0.1
  assert profile["parts"]["experts"]["gflops"] > 0
  assert (
    profile["parts"]["routing"]["gflops"]
    < profile["parts"]["experts"]["gflops"]
  )
  assert "dot" in profile["kinds"] and "while" not in profile["kinds"]
  largest = [operation["ms"] for operation in profile["operations"]]
  assert largest == sorted(largest, reverse=True) and len(largest) == 12


def test_kind_of_a_fusion_is_the_heaviest_inside():
  def function(x, ids):
    return jnp.tanh(x[ids] * 2), jnp.sort(x, axis=0)

  shapes = jnp.zeros((64, 8)), jnp.zeros(16, jnp.int32)
  text = jax.jit(function).lower(*shapes).compile().as_text()
  parsed = hlo.parse(text)
  entry = parsed.computations[parsed.entry]
  kinds = {step_profile.kind_of(i, parsed) for i in entry.values()}
  assert {"gather", "sort"} <= kinds


HEAD = """HloModule jit_f, is_scheduled=true

FileNames
1 "/a/engram_jax/backbone/layers.py"
2 "/a/engram_jax/backbone/moe.py"
3 "/a/site-packages/optax/x.py"
4 "/a/engram_jax/training/step.py"

FunctionNames
1 "SwiGLU.__call__"
2 "MoE.__call__"
3 "_train_step.<locals>.apply"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1 end_line=1 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=1 end_line=1 column=1 end_column=2}
3 {file_name_id=3 function_name_id=1 line=1 end_line=1 column=1 end_column=2}
4 {file_name_id=4 function_name_id=3 line=1 end_line=1 column=1 end_column=2}

StackFrames
1 {file_location_id=2 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=2}
3 {file_location_id=1 parent_frame_id=1}
4 {file_location_id=4 parent_frame_id=1}
5 {file_location_id=3 parent_frame_id=5}


%computation (x: f32[]) -> f32[] {
"""


def test_part_is_of_the_innermost_frame_that_is_ours():
  frames = step_profile.stack_frames(HEAD)
  parts = {n: step_profile.part_of(stack) for n, stack in frames.items()}
  assert parts == {
    1: "experts' sum",
    2: "shared experts",
    3: "dense feed-forward",
    4: "optimizer",
    5: "optimizer",
  }
  assert step_profile.part_of([]) == "other"
  assert step_profile.stack_frames("HloModule jit_f\n") == {}


# --- as programs ---


def test_long_sequence_as_a_program(tmp_path):
  out = tmp_path / "long.json"
  flags = ["--lengths=80,160,320", "--plain_lengths=160", "--preset=tiny"]
  done = program("long_sequence", *flags, f"--out={out}")
  assert done.returncode == 0, done.stderr
  assert "blockwise, 320 tokens: the step may take 40 s" in done.stderr
  assert "plain, length: too long" in done.stdout and str(out) in done.stdout
  result = json.loads(out.read_text())
  assert result["targets"]["loss_reached"]
  lines = result["blockwise"]
  assert [line["length"] for line in lines] == [80, 160, 320]
  assert [line.get("mib_per_1000") for line in lines] == [None, 1000, 1000]
  assert [line["length"] for line in result["plain"]] == [80, 160]


def test_moe_against_dense_as_a_program(tmp_path):
  out = tmp_path / "moe.json"
  flags = ["--variants=capacity 1", f"--out={out}"]
  done = program("moe_against_dense", *flags)
  assert done.returncode == 0, done.stderr
  assert "over dense" in done.stdout and "routing" in done.stdout
  result = json.loads(out.read_text())
  contest, variants = result["contest"]["records"], result["variants"]
  assert [r["model"] for r in contest] == list(moe_against_dense.CONTEST)
  assert [r["ratio"] for r in contest[:2]] == [1, 0.5]
  assert variants["over"] == "moe" and len(variants["records"]) == 2
  assert set(result["profile"]) == {"dense", "moe"}


def test_compile_time_as_a_program(tmp_path):
  out = tmp_path / "compile.json"
  flags = ["--preset=tiny", "--layers=6,30", f"--out={out}"]
  done = program("compile_time", *flags)
  assert done.returncode == 0, done.stderr
  assert "unrolled / scanned" in done.stdout
  result = json.loads(out.read_text())
  assert result["ratios"]["30"]["compile_s"] == 15
  assert result["not_within_limit"] == []
  assert len(result["records"]) == 4

  done = program("compile_time", "--layers=3", f"--out={tmp_path}/x.json")
  assert done.returncode == 2
  last = done.stderr.strip().splitlines()[-1]
  assert last.startswith("error: layers: 3; valid: 6 or more")
