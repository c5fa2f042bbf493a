"""A run's folder: what is written where, and how to open it again.

WORKDIR/
  config.json       the frozen config
  tokenizer.json    a copy: the run needs nothing of the data folder to speak
  compression.npz   the map of token ids to canonical ids
  checkpoints/      see `checkpoints.py`; holds the run metadata too
  metrics.jsonl     one record a line; TensorBoard's files in tensorboard/
  init_from.json    the checkpoint whose weights it started from, if it did
  diverged.json     how it ended, if its numbers were no longer finite
  run.lock          held while it trains: see `locks.py`
"""

import dataclasses
import os
import pathlib

import jax
import tokenizers
from flax import nnx
from jaxtyping import Array

from engram_jax.backbone.transformer import Transformer
from engram_jax.config_dicts import completed, from_dict, to_dict
from engram_jax.errors import InputError, require
from engram_jax.files import usable, whole_file, write_whole
from engram_jax.identity import WeightsIdentity
from engram_jax.memory.memory import Memory
from engram_jax.run_config import ExperimentConfig
from engram_jax.training.checkpoint_files import steps_in
from engram_jax.training.checkpoints import Checkpoints
from engram_jax.training.companions import (
  own_compression,
  own_tokenizer,
  text_digests,
)
from engram_jax.training.json_values import read_object, to_text
from engram_jax.training.locks import LOCK
from engram_jax.training.run_metadata import (
  difference,
  memory_of,
  read_run_metadata,
  weights_identity,
)
from engram_jax.training.setup import TrainSetup


@dataclasses.dataclass(frozen=True)
class RunFolder:
  """Paths of a run."""

  path: pathlib.Path

  @property
  def config(self) -> pathlib.Path:
    return self.path / "config.json"

  @property
  def tokenizer(self) -> pathlib.Path:
    return self.path / "tokenizer.json"

  @property
  def compression(self) -> pathlib.Path:
    return self.path / "compression.npz"

  @property
  def checkpoints(self) -> pathlib.Path:
    return self.path / "checkpoints"

  @property
  def metrics(self) -> pathlib.Path:
    return self.path / "metrics.jsonl"

  @property
  def init_from(self) -> pathlib.Path:
    return self.path / "init_from.json"

  @property
  def diverged(self) -> pathlib.Path:
    return self.path / "diverged.json"

  @classmethod
  def of(cls, workdir: str | os.PathLike) -> "RunFolder":
    """By its path, which may begin with `~`."""
    try:
      return cls(pathlib.Path(workdir).expanduser().absolute())
    except RuntimeError as error:  # ~ of nobody
      raise InputError("workdir", workdir, f"a folder ({error})") from None

  def saved_steps(self) -> list[int]:
    """Steps of its checkpoints by the names on the disk, ascending."""
    folder = self.checkpoints
    with usable(folder, "a folder that can be read", field="workdir"):
      return steps_in(folder) if folder.is_dir() else []

  def has_begun(self) -> bool:
    """Whether a run has come as far as its first step."""
    with usable(self.path, "a folder that can be read", field="workdir"):
      said = self.metrics.exists() or self.diverged.exists()
    return said or bool(self.saved_steps())

  def clear_start(self) -> None:
    """Removes what a start has left that ended before its first step."""
    paths = self.config, self.tokenizer, self.compression, self.init_from
    for path in paths:
      path.unlink(missing_ok=True)
    if self.checkpoints.is_dir():
      self.checkpoints.rmdir()

  def require_usable(self) -> None:
    """Refuses what is neither a new folder, nor an empty one, nor a run's.

    Raises:
      InputError: a file, other files there, or no permission to look.
    """
    valid = "a new or empty folder, or one of a run"
    with usable(self.path, valid, field="workdir"):
      if self.config.exists() or not _exists(self.path):
        return
      empty = self.path.is_dir() and {*os.listdir(self.path)} <= {LOCK}
    require(empty, "workdir", self.path, valid)

  def require_run(self) -> None:
    """Refuses a folder in which no run has begun to save."""
    valid = "the folder of a run, with config.json and checkpoints/"
    with usable(self.path, valid, field="workdir"):
      begun = self.config.exists() and self.checkpoints.is_dir()
    require(begun, "workdir", self.path, valid)


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedModel:
  """A checkpoint, ready for inference.

  Attributes:
    config: config of the run.
    step: step of the checkpoint.
    model: the transformer with its weights.
    tables: per Engram layer [R, d]; empty without a memory, or if not wanted.
    memory: None without a memory.
    tokenizer: the run's.
    setup: for the functions of `step.py`.
    identity: identity of the checkpoint, to be compared with that of a row
      file.
    text_digests: digests of the text it was trained and evaluated on, by split;
      None for one that its checkpoint does not know.
  """

  config: ExperimentConfig
  step: int
  model: Transformer
  tables: dict[int, Array]
  memory: Memory | None
  tokenizer: tokenizers.Tokenizer
  setup: TrainSetup
  identity: WeightsIdentity
  text_digests: dict[str, str | None]


def open_folder(
  workdir: str | os.PathLike, config: ExperimentConfig
) -> RunFolder:
  """Makes the folder of a run, or enters that of the same run.

  Process 0 makes it; the others are to enter after it.

  Args:
    workdir: path of the folder, which need not exist.
    config: config of the run.

  Raises:
    InputError: the folder holds a run of another config, a damaged
      `config.json` or something else, or cannot be written to.
  """
  folder = RunFolder.of(workdir)
  folder.require_usable()
  if folder.config.exists():
    found = completed(
      ExperimentConfig,
      read_object(folder.config, "config.json"),
      source=str(folder.config),
    )
    other = difference({"config": found}, {"config": to_dict(config)})
    if other is not None:
      valid = f"{other.found}, as in {folder.path}; or another workdir"
      raise InputError(other.field, other.expected, valid)
    return folder
  valid = "a folder of a file system that all processes share"
  require(jax.process_index() == 0, "workdir", folder.path, valid)
  with usable(folder.path, "a folder that can be written to", field="workdir"):
    folder.path.mkdir(parents=True, exist_ok=True)
  write_whole(folder.config, to_text(to_dict(config)))
  return folder


def _exists(path: pathlib.Path) -> bool:
  """As `path.exists()`, which hides that a folder above it is a file."""
  try:
    path.lstat()
  except FileNotFoundError:
    return False
  return True


def make_memory(
  config: ExperimentConfig, tokenizer: tokenizers.Tokenizer
) -> Memory | None:
  """The memory of a new run over its tokenizer; None for a model without one.

  Args:
    config: config of the run.
    tokenizer: the tokenizer that its text is encoded with.

  Raises:
    InputError: a pad id that is no token, by its field of the config.
  """
  engram = config.model.engram
  if engram is None:
    return None
  try:
    return Memory.create(engram, tokenizer)
  except InputError as error:
    field = f"model.engram.{error.field}"
    raise InputError(field, error.value, error.valid) from None


def save_tokenizer_of_run(
  folder: RunFolder, source: pathlib.Path, memory: Memory | None
) -> None:
  """Puts tokenizer and compression into the folder, each whole.

  What is there stays once there is a checkpoint: it is the checkpoint's, see
  `companions.py`.

  Args:
    folder: folder of the run.
    source: the tokenizer's file.
    memory: the run's memory, which holds the compression; None without one.
  """
  begun = bool(folder.saved_steps())
  if not (begun and folder.tokenizer.exists()):
    with whole_file(folder.tokenizer) as file:
      file.write(source.read_bytes())
  if memory is not None and not (begun and folder.compression.exists()):
    memory.compression.save(folder.compression)


def load_run(
  workdir: str | os.PathLike, *, step: int | None = None, tables: bool = True
) -> TrainedModel:
  """Opens a checkpoint of a run for inference; nothing is drawn anew.

  Args:
    workdir: the run's folder.
    step: step of the checkpoint; None for the newest.
    tables: False to leave them on the disk: the rows come from elsewhere.

  Raises:
    InputError: no run or no such checkpoint there, or files of another run.
  """
  folder = RunFolder.of(workdir)
  folder.require_run()
  with Checkpoints.open(folder.checkpoints) as saved:
    step = saved.latest_step() if step is None else step
    stored = read_run_metadata(saved, step)
    config = from_dict(ExperimentConfig, stored["config"])
    tokenizer = own_tokenizer(folder.tokenizer, stored)
    compression = None
    if stored["hash"] is not None:
      compression = own_compression(folder.compression, stored)
    memory = memory_of(stored, compression)
    manifest = saved.read_manifest(step)
    setup = TrainSetup.create(config.model, config.train, memory)
    template = setup.abstract_state()
    if not tables:
      template = dataclasses.replace(template, tables=None)
    params, balance, found = saved.restore_weights(template, step=step)
  return TrainedModel(
    config=config,
    step=step,
    model=nnx.merge(setup.graphdef, params, balance),
    tables=found,
    memory=memory,
    tokenizer=tokenizer,
    setup=setup,
    identity=weights_identity(step, stored, manifest),
    text_digests=text_digests(stored),
  )
