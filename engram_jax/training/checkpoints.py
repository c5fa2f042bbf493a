"""Checkpoints: everything that a run needs to go on as if nothing happened.

One folder per step, of separate items, each readable without the others:

  backbone      parameters and balancing biases
  memory        the tables (absent in a model without a memory)
  optimizer     step, optax's state, the row optimizer's states
  data          position of the Grain iterator, a file per process, all alike
  run_metadata  JSON: config, hash, digests, library versions
  manifest      JSON: dtype, shape and checksum of every array; what is here

Arrays are stored by name (`state.flatten`), so that a checkpoint does not
depend on how Flax or optax nest their containers.

A checkpoint is read on any number of devices, whatever number wrote it. A
table, and its optimizer's state, ends in zero rows that make its devices' parts
equal. The manifest says how many rows its hash can name; those beyond are
dropped or added by Orbax while each device reads its part, so that no table is
ever whole on one host. The checksum does not see them (`checksums.py`), but it
would see a row dropped that is not zero. Any other difference is refused.

What may happen to a run, and what keeps a checkpoint right:
  killed while saving     Orbax writes to a temporary folder and renames it;
                          the next run removes what is left over.
  killed while deleting   a checkpoint is renamed away before it is deleted.
  donated while saving    `save` returns before the arrays are written, and the
                          next step may take their buffers. Orbax has copied
                          them to the host by then, except on CPU, where the
                          "copy" is a view of the buffer. But a view counts as
                          a reference, and JAX never writes into a buffer that
                          has one: it lets that one step copy instead. So there
                          is no copy here; a test stands in its place.
  damaged files           refused: the checksums of the manifest do not fit.
  a folder half copied    left out with a line, as is an empty one; a run that
                          goes on renames it to STEP.incomplete.
"""

import json
import math
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from absl import logging
from flax import nnx
from jaxtyping import Array

from engram_jax.errors import first_line, require
from engram_jax.files import usable
from engram_jax.training import processes
from engram_jax.training.checkpoint_files import (
  Keep,
  broken_steps,
  digest,
  listed,
  reading,
  writing,
)
from engram_jax.training.checksums import (
  describe,
  require_same_arrays,
  rows_in_use,
)
from engram_jax.training.json_values import plain
from engram_jax.training.state import TrainState, flatten, unflatten

# Deleted checkpoints wait here: a rename is atomic, a deletion is not.
_DELETED = "deleted"


class Checkpoints:
  """The checkpoints of one run, in one folder. Not for several threads.

  Example:
    >>> with Checkpoints(folder, keep_last=2, keep_best=1) as c:
    ...   if c.latest_step() is not None:
    ...     require_same_run(c.read_run_metadata(), expected)
    ...     state = c.restore(state, data_iterator=iterator)
    ...   ...
    ...   c.save(step, state, data_iterator=iterator, run_metadata=run_metadata)
  """

  def __init__(
    self, directory: str | os.PathLike, *, keep_last: int, keep_best: int
  ):
    """Makes the folder, or takes it over from a run that has ended.

    Only one process (group) at a time may write to a folder: what an
    unfinished save has left there is removed.

    Args:
      directory: the folder.
      keep_last: newest checkpoints kept, at least 1.
      keep_best: checkpoints of lowest evaluation loss kept besides.

    Raises:
      InputError: a number out of range, or damaged files.
    """
    require(keep_last >= 1, "keep_last", keep_last, "at least 1")
    require(keep_best >= 0, "keep_best", keep_best, ">= 0")
    self._open(directory, Keep(keep_last, keep_best))

  @classmethod
  def open(cls, directory: str | os.PathLike) -> "Checkpoints":
    """The checkpoints in a folder, to be read; nothing there is changed.

    Safe while a run is saving into the folder: what is there now is seen.

    Raises:
      InputError: the folder does not exist, or holds damaged files.
    """
    with usable(directory, "a folder with checkpoints", field="directory"):
      is_folder = pathlib.Path(directory).expanduser().is_dir()
    require(is_folder, "directory", directory, "a folder with checkpoints")
    checkpoints = cls.__new__(cls)
    checkpoints._open(directory, None)
    return checkpoints

  def _open(self, directory: str | os.PathLike, keep: Keep | None) -> None:
    # Orbax takes absolute paths only.
    self.directory = pathlib.Path(directory).expanduser().absolute()
    self._read_only = reads = keep is None
    look = lambda: broken_steps(self.directory, set_aside=not reads)
    # A reader may be one process alone.
    self._broken = (
      look() if reads else processes.on_all_processes(look, main_first=True)
    )
    of_writers = {
      "preservation_policy": keep,
      "cleanup_tmp_directories": True,
      "todelete_subdir": _DELETED,
    }
    options = ocp.CheckpointManagerOptions(
      # Not Orbax's `read_only`, which warns of itself: `save` refuses.
      create=not self._read_only,
      # Without `best_fn` Orbax would store no metrics.
      best_fn=lambda metrics: metrics["eval_loss"],
      best_mode="min",
      **({} if self._read_only else of_writers),
    )
    with reading("directory", self.directory):
      self._manager = ocp.CheckpointManager(self.directory, options=options)
      self._losses = {
        step: self._manager.metrics(step)["eval_loss"] for step in self.steps()
      }
    self._purge()

  # --- which there are ---

  def steps(self) -> list[int]:
    """Steps of the whole checkpoints, ascending, one being written included."""
    return sorted(set(self._manager.all_steps()) - set(self._broken))

  def latest_step(self) -> int | None:
    """The newest step; None if there is none."""
    return max(self.steps(), default=None)

  def best_step(self) -> int | None:
    """The step of lowest evaluation loss; None if no checkpoint has one."""
    losses = [(self._losses.get(step), step) for step in self.steps()]
    return min((x for x in losses if x[0] is not None), default=(0, None))[1]

  # --- writing ---

  def save(
    self,
    step: int,
    state: TrainState,
    *,
    data_iterator: grain.DatasetIterator | None = None,
    run_metadata: Mapping[str, Any],
    eval_loss: float | None = None,
  ) -> None:
    """Starts to write a checkpoint and returns; waits for the one before.

    The state may be donated and the iterator advanced as soon as this
    returns. An error while writing is raised by the next call of `save`,
    `wait` or `close`.

    Args:
      step: steps taken; `state.step`.
      state: everything that a step changes.
      data_iterator: its position is saved; None saves none.
      run_metadata: what the run is made of besides its arrays, ready for JSON:
        `config`, hash, digests, `versions`; see `require_same_run`.
      eval_loss: lets the checkpoint compete for the best.

    Raises:
      InputError: a step that is not above all others or not the state's, or
        a loss that is no number.
    """
    latest = self.latest_step()
    valid = "a step to be saved by a writer, not by Checkpoints.open"
    require(not self._read_only, "step", step, valid)
    valid = f"a step after the latest checkpoint, {latest}"
    require(latest is None or step > latest, "step", step, valid)
    require(int(state.step) == step, "step", step, f"state.step, {state.step}")
    loss = None if eval_loss is None else float(eval_loss)
    finite = loss is None or math.isfinite(loss)
    require(finite, "eval_loss", loss, "a finite number, or None")

    run_metadata = plain(run_metadata)
    items = {name: flatten(tree) for name, tree in _split(state).items()}
    items = {name: arrays for name, arrays in items.items() if arrays}
    manifest = {
      "arrays": {name: describe(arrays) for name, arrays in items.items()},
      "rows": rows_in_use(run_metadata),
      "run_metadata": digest(run_metadata),
      "data": data_iterator is not None,
    }
    arguments = {
      name: ocp.args.PyTreeSave(arrays) for name, arrays in items.items()
    }
    arguments["run_metadata"] = ocp.args.JsonSave(run_metadata)
    arguments["manifest"] = ocp.args.JsonSave(manifest)
    if data_iterator is not None:
      arguments["data"] = grain.checkpoint.CheckpointSave(data_iterator)

    self.wait()
    with writing(self.directory / str(step)):
      self._manager.save(
        step,
        args=ocp.args.Composite(**arguments),
        # Always given: without metrics Orbax warns at every save.
        metrics={"eval_loss": loss},
        force=True,
      )
    self._broken.pop(step, None)
    self._losses[step] = loss

  def wait(self) -> None:
    """Returns when nothing is being written.

    Raises:
      InputError: writing failed, of a full disk, say.
    """
    with writing(self.directory):
      self._manager.wait_until_finished()
    self._purge()

  def close(self) -> None:
    """Waits, and ends the background threads."""
    try:
      self.wait()
    finally:
      with writing(self.directory):
        self._manager.close()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
    try:
      self.close()
    except Exception as closing:
      if error is None:
        raise
      # What ended the body is what is to be told.
      logging.warning("while closing the checkpoints: %s", first_line(closing))

  def _purge(self) -> None:
    if not self._read_only and jax.process_index() == 0:
      shutil.rmtree(self.directory / _DELETED, ignore_errors=True)

  # --- reading ---

  def read_run_metadata(self, step: int | None = None) -> dict[str, Any]:
    """What a checkpoint says of its run.

    Args:
      step: None for the latest.

    Raises:
      InputError: no such checkpoint, or a damaged one.
    """
    step = self._resolve(step)
    manifest = self.read_manifest(step)
    run_metadata = self._read(step, run_metadata=ocp.args.JsonRestore())[
      "run_metadata"
    ]
    self._require_whole(
      digest(run_metadata) == manifest["run_metadata"], step, "run_metadata"
    )
    return run_metadata

  def restore(
    self,
    template: TrainState,
    *,
    step: int | None = None,
    data_iterator: grain.DatasetIterator | None = None,
  ) -> TrainState:
    """The state of a checkpoint, bit for bit.

    Whether it is a checkpoint of this very run is for `require_same_run`.

    Args:
      template: arrays or `jax.ShapeDtypeStruct`s of the shapes expected. The
        result has their shardings, or lies on the first device where they
        have none. Tables may be padded for other devices than those that saved:
        with fewer zero rows than the template has devices.
      step: None for the latest.
      data_iterator: is set to the saved position; None leaves it unread.

    Raises:
      InputError: no such checkpoint, a damaged one, or one with other arrays
        than the template's.
    """
    step = self._resolve(step)
    templates = _split(template)
    restored = self._read_arrays(step, templates)
    if data_iterator is not None:
      saved = self.read_manifest(step)["data"]
      valid = "a checkpoint that was saved with a data_iterator"
      require(saved, "data_iterator", f"not in step {step}", valid)
      self._set_position(step, data_iterator)
    backbone, optimizer = restored["backbone"], restored["optimizer"]
    return TrainState(**backbone, **restored["memory"], **optimizer)

  def restore_weights(
    self, template: TrainState, *, step: int | None = None
  ) -> tuple[nnx.State, nnx.State, dict[int, Array]]:
    """What inference needs: parameters, balancing biases and tables.

    The optimizer's items are not read, nor looked at in the template.

    Args:
      template: as for `restore`; its `opt_state` and `table_states` may be
        anything; its `tables` None to leave these out.
      step: None for the latest.

    Raises:
      InputError: as `restore`.
    """
    step = self._resolve(step)
    items = ("backbone",) if template.tables is None else ("backbone", "memory")
    templates = {item: _split(template)[item] for item in items}
    restored = self._read_arrays(step, templates)
    backbone, memory = restored["backbone"], restored.get("memory", {})
    return backbone["params"], backbone["balance"], memory.get("tables", {})

  def _set_position(self, step: int, iterator: grain.DatasetIterator) -> None:
    """Sets the iterator to where it was in all processes of the saving run."""
    path = self.directory / str(step)
    with reading("data", path):
      # Processes take equally many batches, whatever their number, so that any
      # file is everyone's. Grain's own handler wants as many as saved.
      (file,) = (path / "data").glob("process_0-of-*.json")
      iterator.set_state(json.loads(file.read_text()))
      iterator.start_prefetch()

  def _resolve(self, step: int | None) -> int:
    # One that is being written cannot be read yet.
    self.wait()
    steps = self.steps()
    valid = "a folder with a whole checkpoint in it"
    found = f"no checkpoint in {self.directory}"
    if self._broken:
      found += f" ({listed(self._broken)})"
    require(steps, "directory", found, valid)
    valid = f"one of the steps {', '.join(map(str, steps))}"
    wrong = self._broken.get(step)
    require(wrong is None, "step", f"{step}: {wrong}", valid)
    require(step in (None, *steps), "step", step, valid)
    return steps[-1] if step is None else step

  def _read(self, step: int, **items: Any) -> Any:
    (name,) = items
    with reading(name, self.directory / str(step)):
      return self._manager.restore(step, args=ocp.args.Composite(**items))

  def read_manifest(self, step: int) -> dict[str, Any]:
    """What `checksums.py` says of a checkpoint."""
    manifest = self._read(step, manifest=ocp.args.JsonRestore())["manifest"]
    whole = {"arrays", "rows", "run_metadata", "data"} <= set(manifest)
    self._require_whole(whole, step, "manifest")
    return manifest

  def _read_arrays(
    self, step: int, templates: Mapping[str, Any]
  ) -> dict[str, Any]:
    """Trees like `templates`, by item, checked against the manifest."""
    manifest = self.read_manifest(step)
    described, flat = manifest["arrays"], {}
    for name, tree in templates.items():
      # All of them before any is read: that can take long.
      flat[name] = {key: _struct(leaf) for key, leaf in flatten(tree).items()}
      about = described.get(name, {})
      require_same_arrays(name, about, flat[name], manifest["rows"])
    restored = {}
    for name, structs in flat.items():
      found = {}
      if structs:
        arguments = {
          key: ocp.ArrayRestoreArgs(
            sharding=s.sharding,
            global_shape=s.shape,
            dtype=s.dtype,
            # Or Orbax cuts or pads any array to the shape asked for.
            strict=list(s.shape) == described[name][key][1],
          )
          for key, s in structs.items()
        }
        item = ocp.args.PyTreeRestore(structs, restore_args=arguments)
        found = dict(self._read(step, **{name: item})[name])
      for key, about in describe(found).items():
        shape, total = structs[key].shape, described[name][key][2]
        same = about == [str(structs[key].dtype), list(shape), total]
        self._require_whole(same, step, f"{name}/{key}")
      restored[name] = unflatten(templates[name], found)
    return restored

  def _require_whole(self, whole: bool, step: int, what: str) -> None:
    path = self.directory / str(step)
    valid = f"an undamaged checkpoint in {path}; there are {self.steps()}"
    require(whole, what, "not what was saved", valid)


def _split(state: TrainState) -> dict[str, dict[str, Any]]:
  """The parts of a state by the item that holds them."""
  fields = {
    "backbone": ("params", "balance"),
    "memory": ("tables",),
    "optimizer": ("step", "opt_state", "table_states"),
  }
  return {
    item: {name: getattr(state, name) for name in names}
    for item, names in fields.items()
  }


def _struct(leaf: Any) -> jax.ShapeDtypeStruct:
  sharding = getattr(leaf, "sharding", None)
  if sharding is None:
    # Said, or Orbax would take the devices of the run that saved.
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
