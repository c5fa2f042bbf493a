"""The boundary to the shell: bytes in arguments, and what stdout is."""

import io
import os
import sys
from collections.abc import Callable
from typing import Any

from engram_jax.errors import InputError, require

#: What a shell reports of a program that SIGPIPE ended: its reader went away.
READER_GONE = 141


def argument_text(name: str, value: str) -> str:
  """A flag's value as text, whatever the locale that it was decoded with.

  Args:
    name: name of the flag, for the error line.
    value: as Python gives it: a byte that the locale has no character for is
      half a surrogate pair.

  Raises:
    InputError: bytes that are no UTF-8.
  """
  try:
    value.encode()
    return value
  except UnicodeEncodeError:
    pass
  try:
    return os.fsencode(value).decode()
  except UnicodeError:
    raise InputError(name, ascii(value), "text in UTF-8") from None


_failures: list[OSError] = []


def prepare_stdout() -> None:
  """Lets stdout take every character, and notes what it could not be given.

  Where it has no euro sign it gets a backslash and the character's number.
  """
  for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, "reconfigure"):
      stream.reconfigure(errors="backslashreplace")
  # Unbuffered, a failed write leaves no trace but its error.
  if isinstance(sys.stdout, io.TextIOWrapper):
    for name in ("write", "flush"):
      setattr(sys.stdout, name, _noting(getattr(sys.stdout, name)))


def _noting(method: Callable[..., Any]) -> Callable[..., Any]:
  def call(*args: Any) -> Any:
    try:
      return method(*args)
    except OSError as error:
      _failures.append(error)
      raise

  return call


def require_stdout() -> None:
  """Refuses a closed stdout, for a program whose result goes nowhere else."""
  valid = "an open stdout: the result is printed"
  require(sys.stdout is not None, "stdout", "closed", valid)


def stdout_failure() -> OSError | None:
  """Why what is printed cannot be written; None if it can.

  After a failure stdout is given up, and what it still holds is dropped:
  otherwise Python would fail on it once more on its way out.
  """
  if sys.stdout is None:
    return None
  try:
    sys.stdout.flush()
  except OSError as error:
    _failures.append(error)
  if not _failures:
    return None
  nowhere = os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, sys.stdout.fileno())
  os.close(nowhere)
  failure = _failures[0]
  _failures.clear()
  return failure
