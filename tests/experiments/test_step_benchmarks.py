"""The benchmarks of whole training steps, at tiny sizes; no time is judged."""

import dataclasses
import json

import pytest

from engram_jax.errors import InputError
from engram_jax.presets import Preset, preset
from experiments.benchmarks import (
  compile_time,
  harness,
  long_sequence,
  moe_against_dense,
)
from tests.experiments.micro import experiment

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


@pytest.fixture
def children(monkeypatch):
  """Children that answer at once, by what they are asked."""

  def answer_with(answer):
    def in_child(function, *, env=None, timeout=None, **asked):
      found = answer(asked)
      return found and {**found, "peak_mib": 100.0}

    monkeypatch.setattr(harness, "in_child", in_child)

  return answer_with


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
    compile_time.compile_once(form=form, **options)
    for form in compile_time.FORMS
  )
  assert unrolled["instructions"] > 1.2 * scanned["instructions"]
  assert unrolled["lowered_operations"] > 1.2 * scanned["lowered_operations"]
  for answer in (scanned, unrolled):
    parts = [answer[name] for name in compile_time.SECONDS]
    assert sum(parts[:3]) == pytest.approx(parts[3])
  assert json.loads(json.dumps(scanned)) == scanned
  with pytest.raises(InputError, match=r"^form: x; valid: one of scanned, unr"):
    compile_time.compile_once(form="x", **options)


def test_depths_are_compared(children):
  def answer(asked):
    if asked["layers"] == 30 and asked["form"] == "unrolled":
      return None  # not within its time
    slow = 3 if asked["form"] == "unrolled" else 2
    names = ("lowered_operations", "instructions", "temp_mib")
    return dict.fromkeys((*compile_time.SECONDS, *names), slow)

  children(answer)
  options = dict(preset="tiny", limit_s=1, repeats=3, batch=1, length=8)
  result = compile_time.measure(layers=[6, 30], **options)
  assert list(result["ratios"]) == ["6"]
  assert result["ratios"]["6"]["compile_s"] == 1.5
  finished = [r["finished"] for r in result["records"]]
  assert finished == [True, True, True, False]
  assert "unrolled / scanned" in "\n".join(compile_time.tables(result))
  with pytest.raises(InputError, match=r"^layers: 5; valid: 6 or more"):
    compile_time.measure(layers=[6, 5], **options)


# --- long sequence ---


def test_forms_compute_the_same(monkeypatch):
  monkeypatch.setattr(long_sequence, "find_preset", micro)
  plain, blockwise = (
    long_sequence.one_step(preset="", length=24, form=form, **CHUNKS)
    for form in long_sequence.FORMS
  )
  assert (
    set(plain)
    == set(blockwise)
    == {
      *("loss", "grad_norm", "compile_s", "step_s"),
      *("state_mib", "temp_mib"),
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
  found = long_sequence.one_step(preset="", length=8, form="plain", **CHUNKS)
  assert found["refused_by"] == "length: 8; valid: less"
  assert found["temp_mib"] > 0 and "loss" not in found


def answer_of_a_length(asked):
  length, plain = asked["length"], asked["form"] == "plain"
  answer = {"compile_s": 1.0, "state_mib": 9.0, "temp_mib": float(length)}
  if plain and length > 100:
    return {**answer, "refused_by": "length: too long"}
  return {**answer, "step_s": 1.0, "loss": 2.0 + 1e-9, "grad_norm": 1.0}


def test_lengths_are_compared(children):
  children(answer_of_a_length)
  options = dict(preset="tiny", quick=False, **CHUNKS)
  result = long_sequence.measure(
    lengths=[80, 160, 320], plain_lengths=[160], **options
  )
  assert all(one["reached"] for one in result["targets"].values())
  lines = result["blockwise"]
  assert [line["length"] for line in lines] == [80, 160, 320]
  assert [line.get("mib_per_1000") for line in lines] == [None, 1000, 1000]
  assert [line["length"] for line in result["plain"]] == [80, 160]
  text = "\n".join(long_sequence.tables(result))
  assert "plain, length: too long" in text
  with pytest.raises(InputError, match=r"^lengths: \[8, 4\]; valid: one or"):
    long_sequence.measure(lengths=[8, 4], plain_lengths=[], **options)
  with pytest.raises(InputError, match=r"^lengths: \[200\]; valid: a length"):
    long_sequence.measure(lengths=[200], plain_lengths=[], **options)


def test_targets_of_long_sequences(children):
  def answer(asked):
    loss = 2.0 if asked["form"] == "plain" else 2.001
    found = answer_of_a_length(asked)
    return {**found, "loss": loss}

  children(answer)
  result = long_sequence.measure(
    preset="tiny", lengths=[80], plain_lengths=[], quick=False, **CHUNKS
  )
  found = result["targets"]
  assert found["loss_difference"]["value"] == pytest.approx(5e-4)
  assert not found["loss_difference"]["reached"]
  assert found["peak_gib"]["value"] == 100 / 1024


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


def test_experts_against_dense(monkeypatch):
  monkeypatch.setattr(moe_against_dense, "find_preset", micro)
  answer = moe_against_dense.in_turns(
    preset="", names=["dense", "moe"], batch=2, length=16, repeats=1
  )
  assert json.loads(json.dumps(answer)) == answer
  dense, moe = answer["records"]
  for record in (dense, moe):
    assert record["tokens_per_s"] == 32 / (record["median_ms"] / 1e3)
    assert record["loss"] == pytest.approx(5.7, abs=0.2)
  assert dense["ratio"] == 1
  assert dense["dropped"] is None and 0 <= moe["dropped"] < 1
  assert dense["total"] == dense["activated"] < moe["total"]
  # A step multiplies by each activated weight three times, and more.
  assert dense["gflops"] > 6 * 32 * dense["activated"] / 1e9
  text = "".join(moe_against_dense.tables({"contest": answer}))
  assert "tokens_per_s" in text and "moe" in text
