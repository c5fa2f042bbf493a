"""The files of checkpoints: which steps are whole, and errors in one line."""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from absl import logging

from engram_jax.errors import InputError, require
from engram_jax.files import usable
from engram_jax.training.json_values import read_object

# What the system says through TensorStore, in whose errors nothing else tells.
_REFUSED = re.compile(
  r"No space left on device|Disk quota exceeded|File too large|"
  r"Read-only file system|Permission denied|Input/output error|"
  r"Not a directory|Too many open files|Stale file handle",
  re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Keep:
  """Orbax's PreservationPolicy: the newest, and the best of those rated."""

  last: int
  best: int

  def should_preserve(self, checkpoints, *, context):
    """Which checkpoints stay, as Orbax asks for it.

    Args:
      checkpoints: Orbax's records of the steps there are.
      context: ignored.

    Returns:
      A bool for each of them.
    """
    del context
    infos = sorted(checkpoints, key=lambda info: info.step)
    rated = [info for info in infos if info.metrics["eval_loss"] is not None]
    # The sort is stable: of equal losses the earlier one stays.
    rated.sort(key=lambda info: info.metrics["eval_loss"])
    kept = infos[-self.last :] + rated[: self.best]
    steps = {info.step for info in kept}
    return [info.step in steps for info in checkpoints]


def steps_in(directory: pathlib.Path) -> list[int]:
  """What is named as a step's folder is, whole or not, ascending.

  Args:
    directory: a folder that exists.
  """
  names = (path.name for path in directory.iterdir())
  return sorted(int(x) for x in names if re.fullmatch(r"0|[1-9][0-9]*", x))


def broken_steps(directory: pathlib.Path, *, set_aside: bool) -> dict[int, str]:
  """Steps that are not whole, by what is wrong; each is said in one line.

  Args:
    directory: the folder of the checkpoints.
    set_aside: for a run that goes on. It wants more of a checkpoint than
      inference does; it may come to the same steps, so that process 0 renames
      what is in its way; and the folder is made if missing.

  Raises:
    InputError: a folder that cannot be read; with `set_aside` one in which no
      step is whole: to begin anew where there was something is not for a
      program to decide.
  """
  valid = "a folder for checkpoints, which can be read and written to"
  with usable(directory, valid, field="directory"):
    if set_aside and jax.process_index() == 0:
      directory.mkdir(parents=True, exist_ok=True)
    paths = {step: directory / str(step) for step in steps_in(directory)}
    wrong = {
      step: _what_is_missing(path, to_go_on=set_aside)
      for step, path in paths.items()
    }
  broken = {step: what for step, what in wrong.items() if what is not None}
  if set_aside:
    valid = "at least one whole checkpoint; or none, to start from nothing"
    found = f"{directory} ({listed(broken)})"
    ok = not broken or len(broken) < len(paths)
    require(ok, "directory", found, valid)
  for step, what in broken.items():
    logging.warning("%s left out: %s", paths[step], what)
  valid = "a folder that can be written to"
  with usable(directory, valid, field="directory"):
    for step in broken if set_aside and jax.process_index() == 0 else ():
      _rename_aside(paths[step])
  return broken


def listed(broken: Mapping[int, str]) -> str:
  """The steps of `broken_steps` and what is wrong with them, in words."""
  return "; ".join(f"step {step}: {what}" for step, what in broken.items())


def _what_is_missing(path: pathlib.Path, *, to_go_on: bool) -> str | None:
  """Why what is named as a step is no whole one; None if it is.

  Args:
    path: folder of the step.
    to_go_on: training wants more of it than inference does.
  """
  if not path.is_dir():
    return "not a folder"
  if not any(path.iterdir()):
    return "empty"
  documents = {}
  for name in ("manifest", "run_metadata", "metrics"):
    # Orbax has a name of its own for the file of the metrics.
    file = path / name / ("metrics" if name == "metrics" else "metadata")
    try:
      documents[name] = read_object(file, name)
    except InputError as error:
      return f"incomplete: {name}: {error.valid}"
  described = documents["manifest"].get("arrays")
  if not isinstance(described, dict) or "eval_loss" not in documents["metrics"]:
    return "incomplete: damaged manifest or metrics"
  items = [*described, *(["data"] if documents["manifest"].get("data") else [])]
  unused = () if to_go_on else ("optimizer", "data")
  for name in [x for x in items if x not in unused]:
    file = path / name / ("" if name == "data" else "_METADATA")
    if not file.exists():
      return f"incomplete: no {file.relative_to(path)}"
  return None


def _rename_aside(path: pathlib.Path) -> None:
  """Gives it a name that is no step's."""
  aside, count = path.with_name(f"{path.name}.incomplete"), 1
  while aside.exists():
    count += 1
    aside = path.with_name(f"{path.name}.incomplete-{count}")
  path.rename(aside)
  logging.warning("%s renamed to %s", path, aside.name)


def digest(run_metadata: Any) -> str:
  """SHA-256 of what `json_values.plain` gave."""
  return hashlib.sha256(json.dumps(run_metadata).encode()).hexdigest()


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
  """One line of what keeps a checkpoint from being written."""
  try:
    yield
  except (InputError, MemoryError):
    raise
  except Exception as error:
    # Orbax, TensorStore and JAX each have their own way of quoting the system.
    found = " ".join(str(error).split())
    reason = _REFUSED.search(found)
    if reason is None and not isinstance(error, OSError):
      raise
    valid = "a folder on a disk with room for it, which can be written to"
    reason = reason[0] if reason else error.strerror or found
    raise InputError("checkpoint", f"{path}: {reason}", valid) from error


@contextlib.contextmanager
def reading(field: str, path: pathlib.Path) -> Iterator[None]:
  """Turns what damaged files raise into an `InputError`.

  Args:
    field: name of the field, for the error line.
    path: the file or folder that is read.
  """
  try:
    yield
  except (InputError, MemoryError, jax.errors.JaxRuntimeError):
    raise
  # Orbax raises bare `Exception`s for damaged arrays, and JSON, file and zip
  # errors for the rest.
  except Exception as error:
    found = f"{type(error).__name__}: {error}"
    raise InputError(field, found, f"undamaged files in {path}") from error
