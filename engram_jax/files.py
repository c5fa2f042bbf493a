"""Files that appear whole or not at all, and that are opened or refused."""

import contextlib
import errno
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import BinaryIO

from engram_jax.errors import InputError, first_line, require

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def usable(
  path: str | os.PathLike[str], valid: str, *, field: str = "path"
) -> Iterator[None]:
  """Turns what the operating system refuses into one clear line.

  Args:
    path: what the body works on.
    valid: what would be accepted; the system's reason is added.
    field: what the line calls it.

  Raises:
    InputError: the body raised an `OSError`: no permission, no room, no such
      folder, a file where a folder should be.
  """
  try:
    yield
  except OSError as error:
    if error.errno in _FULL:
      valid = "a disk with room for it"
    reason = error.strerror or first_line(error)
    raise InputError(field, path, f"{valid} ({reason})") from None


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
  """A new file to be written, which takes its name when all of it is on disk.

  Until then another process finds the old file, or none; if the body raises,
  nothing has changed.

  Args:
    path: the file, in a folder that exists.

  Raises:
    InputError: a folder that is missing or cannot be written to, a folder of
      that name, or a disk that is full.
  """
  path = pathlib.Path(path)
  with usable(path, "a file in a writable folder"):
    require(not path.is_dir(), "path", path, "a file: this is a folder")
    handle, partial = tempfile.mkstemp(
      dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"
    )
  try:
    with os.fdopen(handle, "wb") as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.chmod(partial, 0o644)  # mkstemp's 0o600 would shut out other users
    os.replace(partial, path)
  except BaseException as error:
    with contextlib.suppress(OSError):  # not instead of what happened
      os.unlink(partial)
    if isinstance(error, OSError) and error.errno in _FULL:
      valid = f"a file on a disk with room for it ({error.strerror})"
      raise InputError("path", path, valid) from None
    raise


def write_whole(path: str | os.PathLike[str], text: str) -> None:
  """Writes a text file, in UTF-8; see `whole_file`.

  Args:
    path: the file, which is replaced if it exists.
    text: its whole content.
  """
  with whole_file(path) as file:
    file.write(text.encode())


def open_to_read(path: pathlib.Path, field: str) -> BinaryIO:
  """An existing file's bytes.

  Args:
    path: the file.
    field: name of the field or flag that gave the path, for the error line.

  Raises:
    InputError: no file of that name, or one that cannot be read; `field` is
      what the line calls it.
  """
  with usable(path, "a file that can be read", field=field):
    require(path.is_file(), field, path, "an existing file")
    return open(path, "rb")
