"""What a run reports, step by step: JSONL that outlives a crash, TensorBoard.

`metrics.jsonl` is the record; each line is one JSON object,

  {"kind": "train" | "eval" | "run", "step": 120, "loss": 3.21, ...}

It is only ever appended to: a restarted run writes the steps since its
checkpoint again, and `read_metrics` lets the later record of a step win. A
process killed in the middle of a write leaves a last line without its newline,
and nothing else; opening the file for writing cuts that line off. TensorBoard's
files are a copy for the eye, up to some seconds behind. No thread writes them:
one that dies, of a full disk, would leave the training waiting for it.

JSON has no NaN and no infinity: they are written as strings (`json_values.py`),
and `read_metrics` gives them back as numbers.
"""

import contextlib
import errno
import json
import os
import pathlib
import re
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

from engram_jax.errors import InputError, require
from engram_jax.files import usable
from engram_jax.training.json_values import finite

KINDS = ("train", "eval", "run")
_OWN_FIELDS = ("kind", "step")
_NON_FINITE = ("NaN", "Infinity", "-Infinity")
_FLUSH_SECONDS = 10


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
  """Numbers by name, with each array spread over one name per entry.

  `max_violation` [n] becomes `max_violation/0` to `max_violation/{n-1}`, in
  the order of the blocks with experts. `gate_mean/{layer}` [G] becomes
  `gate_mean/layer_{layer}/stream_{g}`. Scalars keep their names.

  Args:
    metrics: numbers, or arrays of at most one axis, on a device or not.

  Returns:
    Python floats; a bool is 0 or 1. NaN and infinities stay what they are.

  Raises:
    InputError: a value that is no number or has several axes, or two values
      that would share a name.
  """
  numbers: dict[str, float] = {}
  on_host = jax.device_get(dict(metrics))  # all at once; sorts the names
  for name in metrics:
    value = on_host[name]
    array = np.asarray(value)
    # bfloat16, which NumPy calls kind V, is a number too.
    numeric = array.dtype.kind in "biuf" or array.dtype.name == "bfloat16"
    require(numeric, name, value, "a real number or an array of them")
    require(array.ndim <= 1, name, array.shape, "a scalar or shape [n]")
    if array.ndim:
      gate = re.fullmatch(r"gate_mean/(\d+)", name)
      stem = f"gate_mean/layer_{gate[1]}/stream_" if gate else f"{name}/"
      entries = {f"{stem}{i}": float(v) for i, v in enumerate(array)}
    else:
      entries = {name: float(array)}
    for key, number in entries.items():
      require(key not in numbers, "metrics", key, "different names")
      numbers[key] = number
  return numbers


class MetricsWriter:
  """Writes a run's metrics under its folder; one process of a run does.

  Attributes:
    path: `metrics.jsonl`.
  """

  def __init__(self, workdir: str | os.PathLike[str], *, enabled: bool = True):
    """Opens the folder's record, cutting off a line that a crash tore.

    Args:
      workdir: the run's folder; made if missing. TensorBoard's files go to
        `tensorboard/` in it.
      enabled: False writes nothing: for all processes of a run but one.

    Raises:
      InputError: a folder or a record that cannot be written to.
    """
    folder = pathlib.Path(workdir)
    self.path, self._enabled = folder / "metrics.jsonl", enabled
    self._tensorboard_folder = folder / "tensorboard"
    self._tensorboard: RecordWriter | None = None
    self._flushed = 0.0
    if enabled:
      with usable(self.path, "a file that can be written"):
        folder.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(self.path)

  def write(
    self, step: int, values: Mapping[str, Any], *, kind: str = "train"
  ) -> None:
    """Adds one record; when this returns, killing the process keeps it.

    Args:
      step: optimizer steps taken, >= 0.
      values: what `scalars` takes.
      kind: "train" or "eval", which TensorBoard shows as `kind/name`; "run"
        for what is no curve, such as the seconds of compilation, which go to
        the JSONL file alone.

    Raises:
      InputError: an unknown kind, a negative step, a value that `scalars`
        refuses, or one named as a field of the record; a disk that is full,
        and whatever else keeps the files from being written.
    """
    step = int(step)
    require(kind in KINDS, "kind", kind, f"one of {', '.join(KINDS)}")
    require(step >= 0, "step", step, "an integer >= 0")
    for name in _OWN_FIELDS:
      valid = f"names other than {' and '.join(_OWN_FIELDS)}"
      require(name not in values, "values", name, valid)
    numbers = scalars(values)
    if not self._enabled:
      return
    record = {"kind": kind, "step": step} | finite(numbers)
    line = json.dumps(record, allow_nan=False).encode() + b"\n"
    with usable(self.path, "a file that can be written"):
      _append(self.path, line)
    if kind != "run":
      self._show(step, {f"{kind}/{name}": v for name, v in numbers.items()})

  def _show(self, step: int, numbers: Mapping[str, float]) -> None:
    values = [
      Summary.Value(tag=re.sub(r"[^-/\w.]", "_", name), simple_value=number)
      for name, number in numbers.items()
    ]
    events = [Event(summary=Summary(value=[value])) for value in values]
    with self._writing_tensorboard():
      if self._tensorboard is None:
        self._tensorboard_folder.mkdir(exist_ok=True)
        # Named for whole seconds alone, a quick restart would overwrite it.
        name = f"{int(time.time())}.{socket.gethostname()}.{time.time_ns()}"
        path = self._tensorboard_folder / f"events.out.tfevents.{name}"
        self._tensorboard = RecordWriter(str(path))
        # Hides what an earlier process wrote from here on: these steps are
        # being run again.
        log = SessionLog(status=SessionLog.START)
        start = [Event(file_version="brain.Event:2"), Event(session_log=log)]
        events = start + events
      for event in events:
        event.step, event.wall_time = step, time.time()
        self._tensorboard.write(event.SerializeToString())
      if time.monotonic() - self._flushed > _FLUSH_SECONDS:
        self._tensorboard.flush()
        self._flushed = time.monotonic()

  @contextlib.contextmanager
  def _writing_tensorboard(self) -> Iterator[None]:
    """Names the folder of what fails, and lets go of the file."""
    try:
      with usable(self._tensorboard_folder, "a folder that can be written to"):
        yield
    except BaseException:
      broken, self._tensorboard = self._tensorboard, None
      # It would try once more to write what it holds.
      with contextlib.suppress(OSError):
        if broken is not None:
          broken.close()
      raise

  def close(self) -> None:
    """Writes out what TensorBoard has not got yet. A later write reopens."""
    with self._writing_tensorboard():
      if self._tensorboard is not None:
        self._tensorboard.close()
        self._tensorboard = None

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(self, kind: object, *_: object) -> None:
    # The copy for the eye must not replace what has ended the run.
    with contextlib.suppress(*() if kind is None else (InputError,)):
      self.close()


def read_metrics(
  path: str | os.PathLike[str], kind: str
) -> list[dict[str, Any]]:
  """The records of one kind, by ascending step, one for each step.

  Args:
    path: a `metrics.jsonl`; it may be in the middle of being written.
    kind: one of `KINDS`.

  Returns:
    Dicts of `kind`, `step` and the metrics, all numbers. Of several records of
    a step the last one written stands.

  Raises:
    InputError: an unreadable file, or a line that is no record. Only the last
      line may be torn: it then lacks its newline, and is left out.
  """
  require(kind in KINDS, "kind", kind, f"one of {', '.join(KINDS)}")
  with usable(path, "a readable file"):
    lines = pathlib.Path(path).read_bytes().split(b"\n")
  records = {}
  for number, line in enumerate(lines[:-1], start=1):
    record = _parse(line)
    valid = "a JSON object with kind, step and numbers"
    field = f"{path} line {number}"
    require(record is not None, field, line.decode(errors="replace"), valid)
    if record["kind"] == kind:
      records[record["step"]] = record
  return [records[step] for step in sorted(records)]


def _parse(line: bytes) -> dict[str, Any] | None:
  """The record in `line`, or None if it is no record."""
  try:
    record = json.loads(line)
    step = record["step"]
    if record["kind"] not in KINDS or type(step) is not int or step < 0:
      return None
    for name in record.keys() - set(_OWN_FIELDS):
      value = record[name]
      if value not in _NON_FINITE and type(value) not in (int, float):
        return None
      record[name] = float(value)
  except (ValueError, KeyError, TypeError, AttributeError):
    return None
  return record


def _append(path: pathlib.Path, line: bytes) -> None:
  """Adds a line, or nothing. One write: a reader sees whole lines."""
  with open(path, "ab", buffering=0) as file:
    size = file.tell()
    try:
      if file.write(line) < len(line):  # what room there was has been used
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
      with contextlib.suppress(OSError):
        file.truncate(size)
      raise


def _cut_torn_line(path: pathlib.Path) -> None:
  """Ends the file at its last newline."""
  if not path.exists():
    return
  require(not path.is_dir(), "path", path, "a file: this is a folder")
  if not path.is_file():  # a device has no lines to cut
    return
  with open(path, "r+b") as file:
    end = size = file.seek(0, os.SEEK_END)
    chunk = 1 << 16
    while end > 0:
      start = max(0, end - chunk)
      file.seek(start)
      newline = file.read(end - start).rfind(b"\n")
      if newline >= 0:
        end = start + newline + 1
        break
      end = start
    if end < size:
      file.truncate(end)
