"""Sweeps of runs: one that diverges does not end the others."""

import json

import pytest

from engram_jax.training.divergence import DivergedError
from experiments import sweeps


def test_runs_that_diverged_are_told_apart():
  good, lost = {"seed": 0, "loss": {}}, {"seed": 1, "diverged": "at step 3"}
  assert sweeps.finished([good, lost]) == [good]
  sweeps.require_finished({"memory": [good]})
  with pytest.raises(DivergedError, match=r"^diverged: experts, seed 1$"):
    sweeps.require_finished({"memory": [good], "experts": [good, lost]})
  assert sweeps.spread([]) == "-"


def test_a_value_that_diverges_is_named_and_the_others_are_compared(
  program, tmp_path
):
  out = tmp_path / "out.json"
  done = program(
    "ablate",
    f"--workdir={tmp_path / 'runs'}",
    "--field=train.learning_rate",
    "--values=1e30,1e-2",
    "--seeds=0",
    "--eval_batches=1",
    "--config.train.clip_norm=1e30",
    f"--out={out}",
  )
  assert done.returncode == 0, done.stderr
  bad, good = json.loads(out.read_text())["results"].values()
  assert "diverged at step" in bad[0]["diverged"] and good[0]["loss"]["on"] > 0
  first, second = done.stdout.splitlines()[-2:]
  assert first.split() == ["1e30", "-", "diverged:", "seed", "0"]
  assert "1 seeds" in second


def test_a_rate_at_which_the_rival_diverges_is_left_out(program, tmp_path):
  out = tmp_path / "out.json"
  done = program(
    "compare",
    f"--workdir={tmp_path / 'runs'}",
    "--learning_rates=1e30,1e-2",
    "--seeds=0",
    "--eval_batches=1",
    "--config.train.clip_norm=1e30",
    f"--out={out}",
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(out.read_text())
  assert found["tuning"]["1e+30"] is None and found["learning_rate"] == 1e-2
  assert "tuning-1e+30, seed 100: diverged at step" in done.stdout
