"""A model trained on short text goes on with longer text, as a user does it."""

import json
import math

import numpy as np
import pytest
from flax import nnx

from engram_jax.training.metrics import read_metrics
from engram_jax.training.runs import load_run
from engram_jax.training.state import flatten

CONFIG = """
import json
from engram_jax.config_dicts import from_dict
from engram_jax.run_config import ExperimentConfig
from experiments.cli import as_config_dict

def get_config():
  with open({path!r}) as file:
    return as_config_dict(from_dict(ExperimentConfig, json.load(file)))
"""


def longer(trained, folder):
  """A config file: sequences twice as long, and a rate that changes nothing."""
  values = json.loads((trained / "config.json").read_text())
  model, train = values["model"], values["train"]
  yarn = {"scale": 2.0, "original_length": train["seq_len"]}
  model["attention"] |= {"yarn": yarn, "block_size": 8}
  model["moe"]["balance_rate"] = 0.0
  train |= {"seq_len": 2 * train["seq_len"], "steps": 3, "loss_chunk": 24}
  train["learning_rate"] = 1e-30
  path, config = folder / "longer.json", folder / "longer.py"
  path.write_text(json.dumps(values))
  config.write_text(CONFIG.format(path=str(path)))
  return config


@pytest.fixture(scope="module")
def trained(program, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("short") / "run"
  done = program("pretrain", f"--workdir={workdir}", "--config.train.steps=4")
  assert done.returncode == 0, done.stderr
  return workdir


def test_longer_text(trained, program, tmp_path):
  workdir = tmp_path / "run"
  arguments = (
    "pretrain",
    f"--config={longer(trained, tmp_path)}",
    f"--workdir={workdir}",
    f"--init_from={trained}",
  )
  done = program(*arguments, configured=False)
  assert done.returncode == 0, done.stderr
  assert f"Starting from step 4 of {trained}" in done.stderr
  origin = {
    "workdir": str(trained),
    "step": 4,
    "weights": load_run(trained).identity.weights,
  }
  assert json.loads((workdir / "init_from.json").read_text()) == origin
  records = read_metrics(workdir / "metrics.jsonl", "train")
  assert [record["step"] for record in records] == [1, 2, 3]
  assert all(math.isfinite(record["loss"]) for record in records)
  (before,) = read_metrics(trained / "metrics.jsonl", "eval")
  (after,) = read_metrics(workdir / "metrics.jsonl", "eval")
  assert abs(after["loss"] - before["loss"]) < 0.5

  old, new = load_run(trained), load_run(workdir)
  assert new.config.train.seq_len == 2 * old.config.train.seq_len
  found, expected = (
    flatten({"model": nnx.state(run.model), "tables": run.tables})
    for run in (new, old)
  )
  assert found.keys() == expected.keys()
  for name, leaf in found.items():
    np.testing.assert_allclose(leaf, expected[name], atol=1e-25, err_msg=name)

  again = program(*arguments, configured=False)
  assert again.returncode == 0, again.stderr
  assert f"Resuming {workdir} at step 3" in again.stderr
  assert "the run has checkpoints of its own" in again.stderr


def test_a_model_of_another_shape_is_one_clear_line(trained, program, tmp_path):
  workdir = tmp_path / "run"
  done = program(
    "pretrain",
    f"--workdir={workdir}",
    f"--init_from={trained}",
    "--config.model.moe.num_experts=8",
  )
  assert done.returncode == 2
  (line,) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
  assert "model.moe.num_experts: 8; valid: 4" in line and str(trained) in line
  assert not workdir.exists()
