"""Runs by name: made once, shared, never on text that was seen before."""

import dataclasses
import json

import chex
import pytest
from flax import nnx

from engram_jax.analysis.allocation import share_remainder
from engram_jax.config_dicts import to_dict
from engram_jax.errors import InputError
from engram_jax.training.divergence import DivergedError
from engram_jax.training.locks import locked
from experiments.lab import runs as lab_runs
from experiments.lab.runs import Run, by_group, matched


def make_run(lab, group="a", **changes):
  arguments = dict(tokens=1024, seed=0, learning_rate=4e-3) | changes
  return Run(group, lab.config(lab.scale.model, **arguments))


def test_a_digest_is_of_what_determines_the_run(lab):
  run = make_run(lab)
  assert run.digest == make_run(lab, group="b").digest
  assert run.digest != make_run(lab, seed=1).digest
  assert run.digest != make_run(lab, tokens=2048).digest
  moved = dataclasses.replace(run.config.data, data_dir="/elsewhere")
  config = dataclasses.replace(run.config, data=moved)
  assert Run("a", config).digest == run.digest


def test_models_of_all_shares_are_of_one_size(lab):
  for share in lab.scale.shares[1:]:
    found = share_remainder(lab.scale.model, share, engram=lab.scale.layout)
    assert abs(found["remainder"]) < 0.01 * found["total_experts"]
  assert to_dict(lab.scale.with_memory(0.0)) == to_dict(lab.scale.model)


def test_a_run_is_measured_once_and_its_record_found_again(lab, capsys):
  run, calls = make_run(lab), []

  def measure(trained):
    calls.append(trained.run)
    return {"loss": lab.losses(trained)}

  (record,) = lab.measure_all([run], measure, name="once")
  assert record["loss"].keys() == {"validation", "prose"}
  assert record["tokens"] == 1024 and record["seed"] == 0
  assert "once: 1 runs left" in capsys.readouterr().err
  again = dataclasses.replace(run, labels={"new": 1})
  (found,) = lab.measure_all([again], measure, name="once")
  assert found == {**record, "labels": {"new": 1}} and len(calls) == 1
  assert not (lab.folder / "runs" / run.digest).exists()


def test_a_run_that_another_process_holds_is_waited_for(lab, monkeypatch):
  run = make_run(lab, seed=7)
  path = lab.folder / "records" / "shared" / f"{run.digest}.json"
  with locked(lab.folder / "claims" / run.digest):

    def other_process_finishes(seconds):
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(json.dumps({"seed": 7, "by": "another"}))

    monkeypatch.setattr(lab_runs.time, "sleep", other_process_finishes)
    (record,) = lab.measure_all([run], lambda _: {}, name="shared")
  assert record["by"] == "another"


def test_a_run_that_diverges_is_recorded_and_the_others_go_on(lab, monkeypatch):
  def train(run):
    raise DivergedError("at step 3")

  monkeypatch.setattr(lab, "train", train)
  run = make_run(lab, seed=8)
  (record,) = lab.measure_all([run], lambda _: {}, name="diverges")
  assert record["diverged"] == "at step 3"
  assert by_group([record]) == {}


def test_a_run_starts_from_the_weights_of_another(lab):
  first = make_run(lab, seed=9)
  lab.measure_all([first], lambda _: {}, name="first", keep=True)
  config = dataclasses.replace(
    first.config,
    train=dataclasses.replace(first.config.train, learning_rate=1e-30),
  )
  second = Run("second", config, init_from=first.digest)
  assert second.digest != Run("second", config).digest
  assert second.digest != dataclasses.replace(second, init_step=1).digest
  before, after = lab.train(first), lab.train(second)
  chex.assert_trees_all_close(
    nnx.state(before.model, nnx.Param),
    nnx.state(after.model, nnx.Param),
    atol=1e-6,
  )
  assert before.data.tokenizer.to_str() == after.data.tokenizer.to_str()


def test_no_token_is_seen_twice(lab):
  run = make_run(lab, tokens=10**9)
  with pytest.raises(InputError, match="tokens would be seen twice"):
    lab.train(run)


def test_records_are_matched_by_seed():
  ours = [{"seed": 0, "x": 1}, {"seed": 2, "x": 2}]
  theirs = [{"seed": 1, "x": 3}, {"seed": 2, "x": 4}]
  assert matched(ours, theirs) == [(ours[1], theirs[1])]
