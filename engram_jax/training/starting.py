"""A new run that starts from the weights of another, such as for longer text.

Parameters, balancing biases and tables are another run's; the optimizer, the
schedule, the data and their order begin anew. So the two may differ in whatever
does not say what the weights are or mean (`FREE_FIELDS`); the rest is refused.
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
from engram_jax.training.companions import require_own_files
from engram_jax.training.json_values import (
  first_difference,
  plain,
  read_object,
  to_text,
)
from engram_jax.training.manifest import weights_digest
from engram_jax.training.program import Program
from engram_jax.training.runs import RunFolder, abstract_state, read_constants
from engram_jax.training.state import TrainState

#: Constants in which the two runs may differ, with all that is below them. Of
#: the data, what matters is the tokenizer, which is compared by its digest.
FREE_FIELDS = frozenset(
  {
    "config.model.attention.yarn",
    "config.model.attention.block_size",
    "config.model.scan_blocks",
    "config.model.remat",
    "config.model.dtype",
    "config.model.engram.dtype",
    "config.model.moe.dispatch",
    "config.model.moe.capacity_factor",
    "config.model.moe.balance_rate",
    "config.model.moe.balance_loss",
    "config.data",
    "config.train",
    "config.mesh",
    "data_digest",
    "held_out_digest",
    "versions",
  }
)


@dataclasses.dataclass(frozen=True)
class Origin:
  """A checkpoint to start from.

  Attributes:
    folder: of its run.
    step: of the checkpoint.
    constants: what the checkpoint holds beside its arrays.
    weights: digest of its parameters and tables; None if unknown.
  """

  folder: RunFolder
  step: int
  constants: Mapping[str, Any]
  weights: str | None = None

  def require_same(self, expected: Mapping[str, Any]) -> None:
    """Refuses a run whose weights would be of another shape or meaning.

    Args:
      expected: the new run's constants, or some of them; see `runs.constants`.

    Raises:
      InputError: the first that differs, with both values.
    """
    found = plain({name: self.constants.get(name) for name in expected})
    wanted = plain(expected)
    difference = first_difference(found, wanted, free=FREE_FIELDS.__contains__)
    if difference is not None:
      path, was, mine = difference
      field = path.removeprefix("config.")
      valid = f"{was}, as in {self.folder.path}, whose weights it starts from"
      raise InputError(field, mine, valid)


def find_origin(
  workdir: str | os.PathLike,
  config: ExperimentConfig,
  *,
  init_from: str | os.PathLike | None,
  init_step: int | None,
) -> Origin | None:
  """Where the run in `workdir` is to start from.

  Reads alone: what is refused here leaves no folder behind. All processes of a
  run call it, on files that they share.

  Args:
    workdir: the new run's folder, which need not exist.
    config: the new run's.
    init_from: the other run's folder; None for what the new run's folder says,
      if it has been started before.
    init_step: of the other run's checkpoint; None for the newest.

  Returns:
    None for a run that starts from nothing, or that has checkpoints of its own.

  Raises:
    InputError: no run or no such checkpoint there; another origin than the one
      that the run started from before; or a config that does not fit.
  """
  folder = RunFolder.of(workdir)
  if init_from is None:
    require(init_step is None, "init_step", init_step, "None without init_from")
  if folder.saved_steps():
    return None
  before = None
  if folder.origin.exists():
    before = read_object(folder.origin, "origin.json")
    valid = "an undamaged JSON file with workdir and step"
    whole = {"workdir", "step"} <= set(before)
    require(whole, "origin.json", folder.origin, valid)
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
      constants = read_constants(saved, step)
      weights = weights_digest(saved.read_manifest(step))
    require_own_files(source.tokenizer, source.compression, constants)
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
  origin = Origin(source, step, constants, weights)
  origin.require_same({"config": to_dict(config)})
  return origin


def tokenizer_of(
  folder: RunFolder, origin: Origin | None
) -> pathlib.Path | None:
  """The tokenizer that a run does not train: that of the weights it began with.

  Args:
    folder: of the run, which need not exist.
    origin: from `find_origin`.

  Returns:
    Its file, in the other run's folder or, once the run has checkpoints, in its
    own; None for a run that trains a tokenizer on its text.
  """
  if origin is not None:
    return origin.folder.tokenizer
  return folder.tokenizer if folder.origin.exists() else None


def record_origin(folder: RunFolder, origin: Origin) -> None:
  """Writes into a run's folder where it starts from."""
  found = {
    "workdir": str(origin.folder.path),
    "step": origin.step,
    "weights": origin.weights,
  }
  write_whole(folder.origin, to_text(found))


def state_from(origin: Origin, program: Program) -> TrainState:
  """The state at the start of a run with the weights of `origin`.

  As in `runs.new_state` every array is born where it is to lie, also where the
  other run had other devices.

  Args:
    origin: from `find_origin`; `require_same` is the caller's.
    program: the new run's.

  Raises:
    InputError: a damaged checkpoint, or other arrays than the program's.
  """
  template = abstract_state(program)
  with Checkpoints.open(origin.folder.checkpoints) as saved:
    weights = saved.restore_weights(template, step=origin.step)

  def begin(params, tables):
    step = jnp.zeros((), jnp.int32)
    table_states = {
      layer: program.row_optimizer.init(table)
      for layer, table in tables.items()
    }
    return step, program.optimizer.init(params), table_states

  params, balance, tables = weights
  shardings = None
  if program.mesh is not None:
    made = (template.step, template.opt_state, template.table_states)
    shardings = jax.tree.map(lambda x: x.sharding, made)
  begin = jax.jit(begin, out_shardings=shardings)
  step, opt_state, table_states = begin(params, tables)
  return TrainState(step, params, balance, opt_state, tables, table_states)
