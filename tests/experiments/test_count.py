"""The table of what a model holds and costs, as a user prints it."""

import json

import pytest

from engram_jax.analysis.accounting import PARTS
from engram_jax.errors import InputError
from engram_jax.presets import preset
from experiments.cli import as_config_dict
from experiments.configs.preset import chosen, experiment_of
from experiments.count_report import count, report


def test_a_preset_is_counted_and_written(program, tmp_path):
  out = tmp_path / "count.json"
  done = program(
    "count", "--preset=engram_27b", f"--out={out}", configured=False
  )
  assert done.returncode == 0, done.stderr
  for words in ("26,725,659,860", "74.32%", *preset("engram_27b").assumptions):
    assert words in done.stdout
  found = json.loads(out.read_text())
  assert found["parameters"]["tables"] == 5_792_338_560
  assert found["sparsity"]["rho"] == pytest.approx(0.7432, abs=1e-4)
  assert found["config"]["model"]["moe"]["num_experts"] == 55
  assert "--preset=engram_27b" in found["command"]


def test_a_config_is_counted_with_its_overrides(program):
  done = program("count", "--config.train.optimizer=muon")
  assert done.returncode == 0, done.stderr
  assert "MFLOP per token, 16 tokens a sequence" in done.stdout
  assert "Source" not in done.stdout


@pytest.mark.parametrize("name", ["dense_4b", "engram_40b", "tiny"])
def test_parts_that_are_not_there_are_left_out(name):
  config = experiment_of(name)
  found = count(config)
  printed = report(found, config.train.seq_len).split("\n\n")[0]
  names = [line.split()[0] for line in printed.splitlines()]
  for part in PARTS:
    assert (part in names) == (found["parameters"][part] > 0), part


def test_one_model_is_chosen():
  config = experiment_of("tiny")
  assert chosen("tiny", None) == config
  assert chosen("", as_config_dict(config)) == config
  with pytest.raises(InputError, match="preset, config: neither; valid: eith"):
    chosen("", None)
  with pytest.raises(InputError, match="preset, config: both"):
    chosen("tiny", as_config_dict(config))


@pytest.mark.parametrize(
  "argument",
  [
    "--preset=smal",
    # Found out where the flags are read, not by the program.
    "--config=experiments/configs/preset.py:smal",
  ],
)
def test_an_unknown_preset_is_one_clear_line(argument, program):
  done = program("count", argument, configured=False)
  assert done.returncode == 2, done.stderr
  assert "Traceback" not in done.stderr
  lines = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
  assert len(lines) == 1, done.stderr
  assert "smal; valid: did you mean small" in lines[0]
