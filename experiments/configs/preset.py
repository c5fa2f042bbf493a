"""Any preset as a config: `--config=experiments/configs/preset.py:NAME`.

  python -m experiments.pretrain --workdir=runs/small \
    --config=experiments/configs/preset.py:small

The names are those of `engram_jax/presets.py`. The text is the Python standard
library's sources unless `--config.data.folder` says otherwise, and a tokenizer
of the model's vocabulary is trained on it: for the published models' 129,280
tokens that is a stand-in, and wants more text.
"""

import ml_collections

from engram_jax.errors import require
from engram_jax.presets import preset
from engram_jax.run_config import DataConfig, ExperimentConfig
from experiments.cli import as_config_dict, frozen


def experiment_of(name: str) -> ExperimentConfig:
  """The preset's run on the default text, frozen.

  Raises:
    InputError: no such preset.
  """
  found = preset(name)
  return ExperimentConfig(
    model=found.model,
    data=DataConfig(vocab_size=found.model.vocab_size),
    train=found.train,
    mesh=found.mesh,
  )


def chosen(
  name: str | None, config: ml_collections.ConfigDict | None
) -> ExperimentConfig:
  """What a program with `--preset` and `--config` is to take.

  Raises:
    InputError: none or both are given, or what is given does not fit.
  """
  given = config is not None
  valid = "either --preset=NAME or --config=FILE.py"
  both = "both" if given else "neither"
  require(bool(name) != given, "preset, config", both, valid)
  return frozen(config) if given else experiment_of(name)


def get_config(name: str = "") -> ml_collections.ConfigDict:
  """What `--config` reads; `name` is what follows the colon.

  Raises:
    InputError: no such preset.
  """
  return as_config_dict(experiment_of(name))
