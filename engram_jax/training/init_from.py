"""A new run that starts from the weights of another, such as for longer text.

Parameters, balancing biases and tables are another run's; the optimizer, the
schedule, the data and their order begin anew. So the two may differ in whatever
does not say what the weights are or mean (`run_metadata.FREE_ON_INIT`); the
rest is refused.
The tokenizer is part of what they mean: it comes with them, and any other text
is encoded with it.

What a run started from is written in its folder, so that it starts from there
again if it ends before its first checkpoint. From then on its own checkpoints
count.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from engram_jax.config_dicts import to_dict
from engram_jax.errors import InputError, require
from engram_jax.files import write_whole
from engram_jax.run_config import ExperimentConfig
from engram_jax.training.checkpoints import Checkpoints
from engram_jax.training.checksums import weights_digest
from engram_jax.training.companions import require_own_files
from engram_jax.training.json_values import read_object, to_text
from engram_jax.training.run_metadata import difference, read_run_metadata
from engram_jax.training.runs import RunFolder
from engram_jax.training.setup import TrainSetup
from engram_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class SourceCheckpoint:
  """A checkpoint to start from.

  Attributes:
    folder: folder of its run.
    step: step of the checkpoint.
    run_metadata: what the checkpoint says of its run.
    weights: digest of its parameters and tables; None if unknown.
  """

  folder: RunFolder
  step: int
  run_metadata: Mapping[str, Any]
  weights: str | None = None

  def require_same(self, expected: Mapping[str, Any]) -> None:
    """Refuses a run whose weights would be of another shape or meaning.

    Args:
      expected: the new run's metadata, or some of it; see
        `run_metadata.make_run_metadata`.

    Raises:
      InputError: the first that differs, with both values.
    """
    other = difference(self.run_metadata, expected, init=True)
    if other is not None:
      where = f"{self.folder.path}, whose weights it starts from"
      valid = f"{other.found}, as in {where}"
      raise InputError(other.field, other.expected, valid)


def find_source(
  workdir: str | os.PathLike,
  config: ExperimentConfig,
  *,
  init_from: str | os.PathLike | None,
  init_step: int | None,
) -> SourceCheckpoint | None:
  """Where the run in `workdir` is to start from.

  Reads alone: what is refused here leaves no folder behind. All processes of a
  run call it, on files that they share.

  Args:
    workdir: the new run's folder, which need not exist.
    config: the new run's.
    init_from: the other run's folder; None for what the new run's folder says,
      if it has been started before.
    init_step: step of the other run's checkpoint; None for the newest.

  Returns:
    None for a run that starts from nothing, or that has checkpoints of its own.

  Raises:
    InputError: no run or no such checkpoint there; another checkpoint than
      the one that the run started from before; or a config that does not fit.
  """
  folder = RunFolder.of(workdir)
  if init_from is None:
    require(init_step is None, "init_step", init_step, "None without init_from")
  if folder.saved_steps():
    return None
  before = None
  if folder.init_from.exists():
    before = read_object(folder.init_from, "init_from.json")
    valid = "an undamaged JSON file with workdir and step"
    whole = {"workdir", "step"} <= set(before)
    require(whole, "init_from.json", folder.init_from, valid)
    path = pathlib.Path(before["workdir"])
    if init_from is not None:
      valid = f"{path}, from which this run started before; or another workdir"
      require(
        RunFolder.of(init_from).path == path, "init_from", init_from, valid
      )
    valid = f"{before['step']}, from which this run started before"
    require(init_step in (None, before["step"]), "init_step", init_step, valid)
    init_from, init_step = path, before["step"]
  if init_from is None:
    return None
  source = RunFolder.of(init_from)
  try:
    source.require_run()
    with Checkpoints.open(source.checkpoints) as saved:
      step = saved.latest_step() if init_step is None else init_step
      run_metadata = read_run_metadata(saved, step)
      weights = weights_digest(saved.read_manifest(step))
    require_own_files(source.tokenizer, source.compression, run_metadata)
  except InputError as error:
    names = {"workdir": "init_from", "directory": "init_from"}
    names["step"] = "init_step"
    field = names.get(error.field, error.field)
    raise InputError(field, error.value, error.valid) from None
  # Files of before there was a digest name the checkpoint alone.
  known = before and before.get("weights")
  valid = f"{known}, from which this run started before; or another workdir"
  field = f"weights of step {step} of {source.path}"
  require(known in (None, weights), field, weights, valid)
  found = SourceCheckpoint(source, step, run_metadata, weights)
  found.require_same({"config": to_dict(config)})
  return found


def tokenizer_of(
  folder: RunFolder, source: SourceCheckpoint | None
) -> pathlib.Path | None:
  """The tokenizer that a run does not train: that of the weights it began with.

  Args:
    folder: folder of the run, which need not exist.
    source: from `find_source`.

  Returns:
    Its file, in the other run's folder or, once the run has checkpoints, in its
    own; None for a run that trains a tokenizer on its text.
  """
  if source is not None:
    return source.folder.tokenizer
  return folder.tokenizer if folder.init_from.exists() else None


def record_source(folder: RunFolder, source: SourceCheckpoint) -> None:
  """Writes into a run's folder where it starts from.

  Args:
    folder: folder of the run.
    source: the checkpoint that it starts from.
  """
  found = {
    "workdir": str(source.folder.path),
    "step": source.step,
    "weights": source.weights,
  }
  write_whole(folder.init_from, to_text(found))


def init_state_from(source: SourceCheckpoint, setup: TrainSetup) -> TrainState:
  """The state at the start of a run with the weights of `source`.

  As in `TrainSetup.init_state` every array is born where it is to lie, also
  where the other run had other devices.

  Args:
    source: from `find_source`; `require_same` is the caller's.
    setup: the new run's.

  Raises:
    InputError: a damaged checkpoint, or other arrays than the setup's.
  """
  template = setup.abstract_state()
  with Checkpoints.open(source.folder.checkpoints) as saved:
    weights = saved.restore_weights(template, step=source.step)

  def begin(params, tables):
    step = jnp.zeros((), jnp.int32)
    table_states = {
      layer: setup.row_optimizer.init(table) for layer, table in tables.items()
    }
    return step, setup.optimizer.init(params), table_states

  params, balance, tables = weights
  shardings = None
  if setup.mesh is not None:
    made = (template.step, template.opt_state, template.table_states)
    shardings = jax.tree.map(lambda x: x.sharding, made)
  begin = jax.jit(begin, out_shardings=shardings)
  step, opt_state, table_states = begin(params, tables)
  return TrainState(step, params, balance, opt_state, tables, table_states)
