"""Small .npz files of named arrays: read whole, or refused in one line."""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engram_jax.errors import InputError, require

# What NumPy and zipfile raise for a truncated, foreign or altered file.
_BROKEN = (
  ValueError,
  OSError,
  EOFError,
  KeyError,
  TypeError,
  NotImplementedError,
  RuntimeError,
  zipfile.BadZipFile,
  zlib.error,
)


def read_npz(
  path: Path, names: Sequence[str], *, format: str, writer: str
) -> dict[str, np.ndarray]:
  """The arrays of a file; nothing in it is executed.

  Args:
    path: the file.
    names: names of the arrays that it must hold; others are not read.
    format: text that its array `format` must hold.
    writer: name of the method that writes such a file, for the message.

  Raises:
    InputError: a file that is missing, truncated, altered, or of another
      format.
  """
  require(path.is_file(), "path", path, f"a file written by {writer}")
  try:
    with np.load(path, allow_pickle=False) as file:
      stored = {name: file[name] for name in ("format", *names)}
  except _BROKEN:
    raise InputError(
      "path", path, f"a whole file written by {writer}"
    ) from None
  found = str(stored["format"])
  require(found == format, f"format of {path}", found, format)
  return stored
