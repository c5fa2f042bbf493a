"""A small Engram mixture of experts on the Python standard library's sources.

For two cores without an accelerator: about three minutes of training. The
numbers are those of the preset `tiny` (`engram_jax/presets.py`), the expected
losses are in README.md; the command is

  python -m experiments.pretrain --config=experiments/configs/tiny.py \
    --workdir=runs/tiny
"""

import ml_collections

from engram_jax.run_config import ExperimentConfig
from experiments.cli import as_config_dict
from experiments.configs.preset import experiment_of


def experiment() -> ExperimentConfig:
  """The config, frozen."""
  return experiment_of("tiny")


def get_config() -> ml_collections.ConfigDict:
  """What `--config` reads."""
  return as_config_dict(experiment())
