"""Tests of how a run starts, is refused, and goes on.

Whole runs, with their programs, are in tests/experiments.
"""

import dataclasses
import os
import shutil

import numpy as np
import pytest

from engram_jax.config import (
  AttentionConfig,
  EngramConfig,
  ModelConfig,
  MoEConfig,
)
from engram_jax.errors import InputError
from engram_jax.run_config import DataConfig, ExperimentConfig, TrainConfig
from engram_jax.training.checkpoints import Checkpoints
from engram_jax.training.loop import run
from engram_jax.training.runs import RunFolder, open_folder


def experiment(text, data_dir, *, vocab_size=300, **train) -> ExperimentConfig:
  """A run of one block and two steps."""
  model = ModelConfig(
    vocab_size=vocab_size,
    hidden_size=8,
    num_layers=1,
    attention=AttentionConfig(
      num_heads=1, nope_dim=4, rope_dim=2, value_dim=4, kv_rank=4
    ),
    dense_size=8,
    moe=MoEConfig(num_experts=2, top_k=1, expert_size=4, dispatch="dense"),
    num_dense_layers=0,
    engram=EngramConfig(
      hidden_size=8, layers=(0,), rows_per_head=(53, 59), heads=1, head_dim=4
    ),
  )
  options = dict(steps=2, batch_size=2, seq_len=8, warmup_steps=0)
  options |= dict(eval_every=0, checkpoint_every=1) | train
  return ExperimentConfig(
    model=model,
    data=DataConfig(
      folder=str(text),
      glob="*.txt",
      data_dir=str(data_dir),
      vocab_size=280,
      validation_percent=20,
    ),
    train=TrainConfig(**options),
  )


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  """Thirty small documents of random words, of both splits."""
  folder = tmp_path_factory.mktemp("text")
  rng = np.random.default_rng(0)
  words = ["memory", "expert", "token", "gate", "row", "hash", "the", "of"]
  for i in range(30):
    (folder / f"{i}.txt").write_text(" ".join(rng.choice(words, size=60)))
  return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """Where the prepared text of all runs is kept."""
  return tmp_path_factory.mktemp("data")


def start(config, workdir):
  return run(config, workdir, progress=False)


@pytest.fixture(scope="module")
def refused(text, prepared, tmp_path_factory):
  """A folder in which two first starts were refused."""
  workdir = tmp_path_factory.mktemp("runs") / "run"
  config = experiment(text, prepared, seq_len=100_000)
  with pytest.raises(InputError, match="seq_len"):
    start(config, workdir)
  config = experiment(text, prepared, vocab_size=280)
  moved = dataclasses.replace(config.data, folder=str(workdir / "nothing"))
  with pytest.raises(InputError, match=r"^folder"):
    start(dataclasses.replace(config, data=moved), workdir)
  return workdir


def test_a_refused_start_leaves_a_folder_for_any_config(refused):
  assert {path.name for path in refused.iterdir()} <= {"run.lock"}


@pytest.fixture(scope="module")
def finished(text, prepared, refused):
  """A run in the folder of the refused ones, with the text of its own."""
  own = refused.parent / "text"
  shutil.copytree(text, own)
  result = start(experiment(own, prepared), refused)
  assert result.finished and result.steps_taken == 2
  return refused, own


def test_a_run_that_has_begun_keeps_its_config(finished, prepared):
  workdir, own = finished
  before = (workdir / "config.json").read_text()
  other = experiment(own, prepared, learning_rate=0.5)
  with pytest.raises(InputError, match=r"^train\.learning_rate: 0\.5; valid: "):
    start(other, workdir)
  assert (workdir / "config.json").read_text() == before
  assert RunFolder.of(workdir).saved_steps() == [1, 2]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_text_that_changed_is_named_on_resume(finished, prepared, split):
  from engram_jax.data.sources import split_of

  workdir, own = finished
  config = experiment(own, prepared)
  percent = config.data.validation_percent
  path = next(
    path
    for path in sorted(own.iterdir())
    if split_of(path.name.encode(), validation_percent=percent) == split
  )
  before = path.read_text()
  try:
    path.write_text(before + " and more words than before")
    line = f"^digest of the {split} text of {own}: .*it has changed since$"
    with pytest.raises(InputError, match=line):
      start(config, workdir)
  finally:
    path.write_text(before)
  assert start(config, workdir).steps_taken == 0


def test_a_start_that_fails_before_its_first_step_is_undone(
  text, prepared, tmp_path, monkeypatch
):
  def fails(*args, **kwargs):
    raise MemoryError("as on a device that is too small")

  monkeypatch.setattr("engram_jax.training.loop.make_train_step", fails)
  workdir = tmp_path / "run"
  with pytest.raises(MemoryError):
    start(experiment(text, prepared), workdir)
  other = experiment(text, prepared, batch_size=4)
  assert open_folder(workdir, other).config.exists()


def test_files_that_were_there_are_never_removed(text, prepared, tmp_path):
  # As of a model from elsewhere, whose files have the names of a run's.
  for name in ("config.json", "tokenizer.json"):
    (tmp_path / name).write_text("{}")
  with pytest.raises(InputError):
    start(experiment(text, prepared), tmp_path)
  assert sorted(os.listdir(tmp_path))[:1] == ["config.json"]
  assert (tmp_path / "tokenizer.json").read_text() == "{}"


def test_checkpoints_of_an_empty_folder(tmp_path):
  folder = RunFolder.of(tmp_path)
  assert not folder.has_begun()
  with Checkpoints(folder.checkpoints, keep_last=1, keep_best=0):
    pass
  folder.clear_start()
  assert not folder.checkpoints.exists()
