"""Configs of earlier versions: completed, or refused by name."""

import copy
import json
import pathlib

import pytest

from engram_jax.config_dicts import completed, from_dict, to_dict
from engram_jax.errors import InputError
from engram_jax.run_config import ExperimentConfig, TrainConfig
from engram_jax.training.run_metadata import require_same_run
from engram_jax.training.runs import open_folder

# Saved before train.table_optimizer, model.remat and the mesh existed.
OLD = json.loads(
  (pathlib.Path(__file__).parent / "golden" / "old_config.json").read_text()
)


def test_fields_that_were_added_since_get_their_defaults(caplog):
  before = copy.deepcopy(OLD)
  found = completed(ExperimentConfig, OLD, source="config.json")
  assert OLD == before and "mesh" not in OLD
  config = from_dict(ExperimentConfig, found)
  assert config.train.table_optimizer == TrainConfig.table_optimizer
  require_same_run({"config": found}, {"config": to_dict(config)})
  completed(ExperimentConfig, OLD, source="config.json")
  (line,) = [r.message for r in caplog.records if "newer" in r.message]
  for name in ("train.table_optimizer = 'lazy_adam'", "model.remat", "mesh"):
    assert name in line


def test_a_run_of_an_older_version_is_entered(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(OLD))
  config = from_dict(ExperimentConfig, OLD)
  open_folder(tmp_path, config)
  changed = to_dict(config)
  changed["train"]["table_optimizer"] = "sinkhorn"
  with pytest.raises(InputError, match=r"^train\.table_optimizer: .*lazy_adam"):
    open_folder(tmp_path, from_dict(ExperimentConfig, changed))


def test_a_field_that_is_no_more_is_refused(tmp_path):
  old = copy.deepcopy(OLD)
  old["train"]["warm_up"] = 3
  with pytest.raises(InputError, match=r"^train\.warm_up: unknown field in a"):
    completed(ExperimentConfig, old, source="a file")
  del old["train"]["warm_up"], old["train"]["steps"]
  assert "steps" not in completed(ExperimentConfig, old, source="x")["train"]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_that_json_has_not_are_refused(value):
  config = to_dict(from_dict(ExperimentConfig, OLD))
  config["train"]["weight_decay"] = value
  with pytest.raises(InputError, match=r"^train\.weight_decay: "):
    from_dict(ExperimentConfig, config)


@pytest.mark.parametrize("content", ["", '{"model": {', "[]", '{"model": 3}'])
def test_a_damaged_config_is_one_clear_line(tmp_path, content):
  (tmp_path / "config.json").write_text(content)
  with pytest.raises(InputError):
    open_folder(tmp_path, from_dict(ExperimentConfig, OLD))
