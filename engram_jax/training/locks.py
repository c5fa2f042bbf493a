"""One run at a time in a folder, enforced by a lock that the kernel releases.

A file that says "in use" would stay behind a killed process. What is held here
is `flock` on such a file: it ends with the process that holds it, however that
ends. The file itself stays, since removing it would let a third run lock a new
one while a second still waits for the old; its text says who holds it.
"""

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
import time
from collections.abc import Iterator

from absl import logging

from engram_jax.errors import InputError
from engram_jax.files import usable

#: Name of the file in a run's folder.
LOCK = "run.lock"

_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
  """Holds the lock of a run's folder, which is made if missing.

  Args:
    folder: the run's.

  Raises:
    InputError: another run holds it, in this process or another one, or the
      folder cannot be written to.
  """
  valid = "a folder that can be written to"
  with usable(folder, valid, field="workdir"):
    folder.mkdir(parents=True, exist_ok=True)
    # Not inherited by the programs that this one starts.
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
  try:
    _lock(handle, folder)
    yield
  finally:
    os.close(handle)


def _lock(handle: int, folder: pathlib.Path) -> None:
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    holder = os.pread(handle, 200, 0).decode(errors="replace").strip()
    valid = f"a folder that no run is using; one is: {holder or 'unknown'}"
    raise InputError("workdir", folder, valid) from None
  except OSError as error:
    if error.errno not in _UNSUPPORTED:
      raise
    line = "%s: its file system has no locks (%s); start no second run there"
    logging.warning(line, folder, error.strerror)
  since = time.strftime("%Y-%m-%d %H:%M:%S")
  holder = f"process {os.getpid()} on {socket.gethostname()} since {since}"
  with contextlib.suppress(OSError):  # of a full disk: for messages alone
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"{holder}\n".encode(), 0)
