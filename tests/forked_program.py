"""A program that a server has forked, in the shape of `subprocess.Popen`."""

import locale
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from typing import Any


class ForkedProgram:
  """A forked program: as much of `subprocess.Popen` as the tests use.

  Args:
    args: what a new interpreter would have been started with.
    streams: the read ends of its stdout and stderr.
    reports: where the server tells the process's id, and how it has ended.
  """

  def __init__(
    self, args: Sequence[str], streams: Sequence[int], reports: socket.socket
  ):
    self.args = args
    self.stdout, self.stderr = (
      open(stream, encoding=locale.getencoding()) for stream in streams
    )
    self._reports = reports
    self.pid = self._report(None)
    self.returncode: int | None = None

  def _report(self, timeout: float | None) -> int:
    self._reports.settimeout(timeout)
    report = self._reports.recv(64)
    if not report:
      raise RuntimeError(f"the program server is gone: {self.args}")
    return int(report)

  def wait(self, timeout: float | None = None) -> int:
    if self.returncode is None:
      try:
        self.returncode = self._report(timeout)
      except (TimeoutError, BlockingIOError):
        raise subprocess.TimeoutExpired(self.args, timeout) from None
      self._reports.close()
    return self.returncode

  def poll(self) -> int | None:
    try:
      return self.wait(0)
    except subprocess.TimeoutExpired:
      return None

  def communicate(self, timeout: float | None = None) -> tuple[str, str]:
    end = None if timeout is None else time.monotonic() + timeout
    read: dict[Any, list[bytes]] = {self.stdout: [], self.stderr: []}
    with selectors.DefaultSelector() as selector:
      for stream in read:
        selector.register(stream, selectors.EVENT_READ)
      while selector.get_map():
        left = None if end is None else max(0.0, end - time.monotonic())
        ready = selector.select(left)
        if not ready:
          raise subprocess.TimeoutExpired(self.args, timeout)
        for key, _ in ready:
          part = os.read(key.fd, 1 << 16)
          read[key.fileobj].append(part)
          if not part:
            selector.unregister(key.fileobj)
    self.wait(None if end is None else max(0.0, end - time.monotonic()))
    texts = []
    for stream, parts in read.items():
      texts.append(b"".join(parts).decode(stream.encoding))
      stream.close()
    return texts[0], texts[1]

  def send_signal(self, number: int) -> None:
    if self.poll() is None:
      os.kill(self.pid, number)

  def terminate(self) -> None:
    self.send_signal(signal.SIGTERM)

  def kill(self) -> None:
    self.send_signal(signal.SIGKILL)
