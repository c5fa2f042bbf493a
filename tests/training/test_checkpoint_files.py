"""One incomplete step does not hide the intact ones."""

import json
import shutil

import pytest

from engram_jax.errors import InputError
from engram_jax.training.checkpoints import Checkpoints


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
  """A folder with the steps 1 and 2."""
  import dataclasses

  import jax.numpy as jnp

  folder = tmp_path_factory.mktemp("saved") / "checkpoints"
  with Checkpoints(folder, keep_last=9, keep_best=0) as checkpoints:
    for step in (1, 2):
      state = dataclasses.replace(tiny.state(), step=jnp.int32(step))
      checkpoints.save(step, state, run_metadata={"config": {}})
  return folder


def leave(*names):
  def damage(step):
    for path in step.iterdir():
      if path.name not in names:
        shutil.rmtree(path) if path.is_dir() else path.unlink()

  return damage


DAMAGES = {
  "empty": leave(),
  "no manifest": leave("backbone", "run_metadata", "metrics"),
  "no backbone": lambda step: shutil.rmtree(step / "backbone"),
  "an empty item": lambda step: [
    shutil.rmtree(step / "memory"),
    (step / "memory").mkdir(),
  ],
  "no metrics": lambda step: shutil.rmtree(step / "metrics"),
  "a manifest cut short": lambda step: (
    step / "manifest" / "metadata"
  ).write_text('{"arrays": {'),
  "a file": lambda step: [shutil.rmtree(step), step.write_text("x")],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_whole_is_left_out_by_name(saved, tmp_path, damage, caplog):
  folder = tmp_path / "checkpoints"
  shutil.copytree(saved, folder)
  shutil.copytree(folder / "2", folder / "3")
  DAMAGES[damage](folder / "3")
  with Checkpoints.open(folder) as checkpoints:
    assert checkpoints.steps() == [1, 2] and checkpoints.latest_step() == 2
    assert checkpoints.read_run_metadata() == {"config": {}}
    with pytest.raises(
      InputError, match=r"^step: 3: .*; valid: one of .* 1, 2$"
    ):
      checkpoints.read_run_metadata(3)
  assert "left out" in caplog.text and (folder / "3").exists()
  # A run that goes on may come to step 3 again.
  with Checkpoints(folder, keep_last=9, keep_best=0) as checkpoints:
    assert checkpoints.latest_step() == 2
  assert not (folder / "3").exists() and (folder / "3.incomplete").exists()


def test_inference_needs_no_optimizer_and_training_does(saved, tmp_path):
  folder = tmp_path / "checkpoints"
  shutil.copytree(saved, folder)
  shutil.rmtree(folder / "2" / "optimizer")
  with Checkpoints.open(folder) as checkpoints:
    assert checkpoints.latest_step() == 2
  with Checkpoints(folder, keep_last=9, keep_best=0) as checkpoints:
    assert checkpoints.latest_step() == 1


def test_nothing_begins_anew_where_there_was_something(tmp_path):
  (tmp_path / "20").mkdir()
  with pytest.raises(InputError, match=r"^directory: .*step 20: empty"):
    Checkpoints(tmp_path, keep_last=1, keep_best=0)
  assert json.dumps([x.name for x in tmp_path.iterdir()]) == '["20"]'


def test_a_folder_that_is_a_file_is_one_clear_line(tmp_path):
  (tmp_path / "checkpoints").write_text("x")
  with pytest.raises(InputError, match=r"^directory: "):
    Checkpoints(tmp_path / "checkpoints", keep_last=1, keep_best=0)
