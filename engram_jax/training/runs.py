"""A run's folder: what is written where, and how to open it again.

WORKDIR/
  config.json       the frozen config
  tokenizer.json    a copy: the run needs nothing of the data folder to speak
  compression.npz   the map of token ids to canonical ids
  checkpoints/      see `checkpoints.py`; holds the hash constants too
  metrics.jsonl     one record a line; TensorBoard's files in tensorboard/
  origin.json       the checkpoint whose weights it started from, if it did
  diverged.json     how it ended, if its numbers were no longer finite
  run.lock          held while it trains: see `locks.py`
"""

import dataclasses
import importlib.metadata
import os
import pathlib
from typing import Any

import jax
import tokenizers
from flax import nnx
from jaxtyping import Array

from engram_jax import sharding
from engram_jax.backbone.transformer import Transformer
from engram_jax.config_dicts import completed, from_dict, to_dict
from engram_jax.errors import InputError, require
from engram_jax.files import usable, whole_file, write_whole
from engram_jax.identity import WeightsIdentity
from engram_jax.memory.compression import TokenCompression
from engram_jax.memory.hashing import NgramHash
from engram_jax.run_config import ExperimentConfig
from engram_jax.training.checkpoint_files import steps_in
from engram_jax.training.checkpoints import Checkpoints, check_constants
from engram_jax.training.companions import (
  own_compression,
  own_tokenizer,
  tokenizer_digest,
  weights_identity,
)
from engram_jax.training.json_values import read_object, to_text
from engram_jax.training.locks import LOCK
from engram_jax.training.program import Program
from engram_jax.training.state import TrainState, abstract_model, init_state


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
  def origin(self) -> pathlib.Path:
    return self.path / "origin.json"

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
    config: of the run.
    step: of the checkpoint.
    model: the transformer with its weights.
    tables: per Engram layer [R, d]; empty without a memory, or if not wanted.
    hashing: None without a memory.
    compression: None without a memory.
    tokenizer: the run's.
    program: for the functions of `step.py`.
    identity: of the checkpoint, to be compared with that of a row file.
    text_digests: of the text that it was trained and rated on, by split; None
      for one that its checkpoint does not know.
  """

  config: ExperimentConfig
  step: int
  model: Transformer
  tables: dict[int, Array]
  hashing: NgramHash | None
  compression: TokenCompression | None
  tokenizer: tokenizers.Tokenizer
  program: Program
  identity: WeightsIdentity
  text_digests: dict[str, str | None]


def open_folder(
  workdir: str | os.PathLike, config: ExperimentConfig
) -> RunFolder:
  """Makes the folder of a run, or enters that of the same run.

  Process 0 makes it; the others are to enter after it.

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
    try:
      check_constants({"config": found}, {"config": to_dict(config)})
    except InputError as error:
      valid = f"{error.valid}, as in {folder.path}; or another workdir"
      raise InputError(error.field, error.value, valid) from None
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


def read_constants(saved: Checkpoints, step: int | None = None) -> dict:
  """A checkpoint's constants, with the defaults of fields that it predates.

  Args:
    saved: the checkpoints.
    step: None for the latest.

  Raises:
    InputError: no such checkpoint, a damaged one, or one whose config has
      fields that are unknown here.
  """
  stored = saved.read_constants(step)
  source = f"the checkpoint in {saved.directory}"
  config = completed(ExperimentConfig, stored["config"], source=source)
  return stored | {"config": config}


def constants(
  config: ExperimentConfig,
  *,
  hashing: NgramHash | None,
  compression: TokenCompression | None,
  tokenizer: tokenizers.Tokenizer,
  data_digest: str,
  held_out_digest: str | None = None,
) -> dict[str, Any]:
  """What every checkpoint holds beside its arrays, ready for JSON."""
  packages = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
  return {
    "config": to_dict(config),
    "hash": hashing and hashing.to_dict(),
    "compression_digest": compression and compression.digest,
    "compression_size": compression and compression.size,
    "tokenizer_digest": tokenizer_digest(tokenizer),
    "data_digest": data_digest,
    "held_out_digest": held_out_digest,
    "versions": {name: importlib.metadata.version(name) for name in packages},
  }


def make_memory(
  config: ExperimentConfig, tokenizer: tokenizers.Tokenizer
) -> tuple[NgramHash | None, TokenCompression | None]:
  """Draws the hash of a new run over its tokenizer's canonical ids."""
  memory = config.model.engram
  if memory is None:
    return None, None
  compression = TokenCompression.from_tokenizer(tokenizer)
  require(
    memory.pad_id < compression.vocab_size,
    "model.engram.pad_id",
    memory.pad_id,
    f"a token id below the tokenizer's {compression.vocab_size}",
  )
  hashing = NgramHash.create(
    vocab_size=compression.size,
    rows_per_head=memory.rows_per_head,
    heads=memory.heads,
    layers=memory.layers,
    pad_id=int(compression.canonical_ids[memory.pad_id]),
    seed=memory.seed,
  )
  return hashing, compression


def save_tokenizer_of_run(
  folder: RunFolder, source: pathlib.Path, compression: TokenCompression | None
) -> None:
  """Puts tokenizer and compression into the folder, each whole.

  What is there stays once there is a checkpoint: it is the checkpoint's, see
  `companions.py`.
  """
  begun = bool(folder.saved_steps())
  if not (begun and folder.tokenizer.exists()):
    with whole_file(folder.tokenizer) as file:
      file.write(source.read_bytes())
  if compression is not None and not (begun and folder.compression.exists()):
    compression.save(folder.compression)


def load_run(
  workdir: str | os.PathLike, *, step: int | None = None, tables: bool = True
) -> TrainedModel:
  """Opens a checkpoint of a run for inference; nothing is drawn anew.

  Args:
    workdir: the run's folder.
    step: of the checkpoint; None for the newest.
    tables: False to leave them on the disk: the rows come from elsewhere.

  Raises:
    InputError: no run or no such checkpoint there, or files of another run.
  """
  folder = RunFolder.of(workdir)
  folder.require_run()
  with Checkpoints.open(folder.checkpoints) as saved:
    step = saved.latest_step() if step is None else step
    stored = read_constants(saved, step)
    config = from_dict(ExperimentConfig, stored["config"])
    hashing = stored["hash"] and NgramHash.from_dict(stored["hash"])
    tokenizer = own_tokenizer(folder.tokenizer, stored)
    compression = None
    if hashing is not None:
      compression = own_compression(folder.compression, stored)
    manifest = saved.read_manifest(step)
    graph, _, _ = abstract_model(config.model)
    program = Program.create(
      config.model,
      config.train,
      graph,
      hashing=hashing,
      compression=compression,
    )
    template = abstract_state(program)
    if not tables:
      template = dataclasses.replace(template, tables=None)
    params, balance, found = saved.restore_weights(template, step=step)
  return TrainedModel(
    config=config,
    step=step,
    model=nnx.merge(graph, params, balance),
    tables=found,
    hashing=hashing,
    compression=compression,
    tokenizer=tokenizer,
    program=program,
    identity=weights_identity(step, stored, manifest),
    text_digests={
      "train": stored["data_digest"],
      "validation": stored.get("held_out_digest"),
    },
  )


def abstract_state(program: Program) -> TrainState:
  """Shapes, dtypes and shardings of the program's state; allocates nothing."""
  shapes = jax.eval_shape(lambda: initial_state(program))
  if program.mesh is None:
    return shapes
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    sharding.state_shardings(shapes, program.mesh),
  )


def new_state(program: Program) -> TrainState:
  """The state at the start of the program's run.

  Every array is born where it is to lie: a table that no single device could
  hold is never in one piece.
  """
  if program.mesh is None:
    return jax.jit(lambda: initial_state(program))()
  shardings = jax.tree.map(lambda x: x.sharding, abstract_state(program))
  return jax.jit(lambda: initial_state(program), out_shardings=shardings)()


def initial_state(program: Program) -> TrainState:
  """`new_state` without its placing. Pure: jit it."""
  return init_state(
    jax.random.key(program.train.seed),
    program.model,
    program.hashing,
    optimizer=program.optimizer,
    row_optimizer=program.row_optimizer,
    shards=sharding.size(program.mesh),
  )
