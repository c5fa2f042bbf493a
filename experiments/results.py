"""Results as JSON: the figures, and what one needs to get them again."""

import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax

from engram_jax.errors import (
  InputError,
  NonFiniteError,
  first_line,
  require,
)
from engram_jax.files import write_whole

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


def _commit() -> str:
  """The commit of the code that this process imported."""
  git = ["git", "-C", str(ROOT)]
  try:
    ask = dict(capture_output=True, text=True, check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], **ask).stdout.strip()
    status = subprocess.run([*git, "status", "--porcelain"], **ask).stdout
    commit += "-dirty" if status.strip() else ""
  except (OSError, subprocess.CalledProcessError):
    commit = "unknown: not a git checkout"
  return commit


#: Asked when the program starts: a long run measures what it imported, whatever
#: is committed meanwhile.
COMMIT = _commit()


def environment() -> dict[str, Any]:
  """Machine, versions, commit and date of a measurement."""
  devices = jax.devices()
  return {
    "python": platform.python_version(),
    "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    "platform": devices[0].platform,
    "device": devices[0].device_kind,
    "devices": len(devices),
    "cpu": _cpu_model(),
    "cores": os.cpu_count(),
    "commit": COMMIT,
    "date": time.strftime("%Y-%m-%d", time.gmtime()),
  }


def command() -> str:
  """The command line of this process, as one would type it."""
  spec = sys.modules["__main__"].__spec__
  name = f"-m {spec.name}" if spec else sys.argv[0]
  return shlex.join(["python", *name.split(), *sys.argv[1:]])


def require_place(path: str | os.PathLike, field: str = "out") -> pathlib.Path:
  """The path of a file that can be written, before the work is done for it.

  Args:
    path: the file; folders above it that are missing are made.
    field: name of the flag, to blame.

  Raises:
    InputError: a folder, or a place where this user cannot make a file.
  """
  try:
    path = pathlib.Path(path).expanduser().absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    is_folder = path.is_dir()
    with tempfile.TemporaryFile(dir=path.parent):
      pass
  except (OSError, RuntimeError, ValueError) as error:
    # A home that is not there is a RuntimeError, a NUL a ValueError.
    valid = f"a file in a folder that can be written to ({first_line(error)})"
    raise InputError(field, path, valid) from None
  require(not is_folder, field, path, "a file: this is a folder")
  return path


def write_result(path: str | os.PathLike, result: dict[str, Any]) -> None:
  """Writes `result` and the environment to a JSON file, whole."""
  path = require_place(path)
  whole = {"command": command(), **result, "environment": environment()}
  try:
    text = json.dumps(whole, indent=2, allow_nan=False)
  except ValueError:
    raise NonFiniteError(f"{path}: a number of the result is none") from None
  write_whole(path, text + "\n")


def _cpu_model() -> str:
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    return platform.processor() or "unknown"
  names = [x.split(":", 1)[1].strip() for x in lines if "model name" in x]
  return names[0] if names else platform.processor() or "unknown"
