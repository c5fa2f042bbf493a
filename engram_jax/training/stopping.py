"""Signals that ask a process to stop, and what happens if it does not.

The first SIGINT or SIGTERM asks: training saves and ends (`stop_requests`). A
second one ends the process at once. Python's own handlers run only between two
instructions of the main thread, so that neither would be noticed while that
thread waits inside JAX, or in a queue that nobody empties. The second one is
therefore the business of a thread: the interpreter's C handler writes the
number of each signal into a pipe, whatever the main thread does.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

#: The signals that ask a process to stop.
STOPS = (signal.SIGINT, signal.SIGTERM)

# `timeout` and some job schedulers send the same signal to a process and to
# its group: two within microseconds are one request.
_ONE_REQUEST_SECONDS = 0.3


class StoppedError(RuntimeError):
  """A signal ended a run before its end, where only a whole one is of use."""


@contextlib.contextmanager
def second_signal_ends() -> Iterator[None]:
  """A second SIGINT or SIGTERM ends the process, whatever it waits for.

  The exit status is 128 + the signal's number, as a shell reports it. Signals
  without a handler in Python act as they do without this. Only the main
  thread of a process can ask for it; in another one nothing is done.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  reading, writing = os.pipe()
  os.set_blocking(writing, False)
  before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
  watcher = threading.Thread(
    target=_watch, args=(reading, before), name="signals", daemon=True
  )
  watcher.start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(before)
    os.close(writing)  # what ends the watcher
    watcher.join()


def _watch(reading: int, before: int) -> None:
  """Reads the numbers of signals until the pipe is closed."""
  first = None
  while numbers := os.read(reading, 64):
    for number in numbers:
      if number not in STOPS:
        continue
      now = time.monotonic()
      if first is None:
        first = now
      elif now - first >= _ONE_REQUEST_SECONDS:
        name = signal.Signals(number).name
        line = f"a second signal, {name}: ended at once, without saving"
        # By `write`: the main thread may hold the lock of sys.stderr.
        with contextlib.suppress(OSError):
          os.write(2, f"\nerror: {line}\n".encode())
        os._exit(128 + number)
    if before >= 0:  # whoever listened until now, such as an event loop
      with contextlib.suppress(OSError):
        os.write(before, numbers)
  os.close(reading)


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
  """A list that fills with the signals that ask the process to stop.

  A second one ends it: see `second_signal_ends`.
  """
  received: list[int] = []

  def note(number, frame):
    del frame
    if not received:
      name = signal.Signals(number).name
      # Not by `print`, which the signal may have interrupted.
      line = f"\n{name}: saving after this step; once more to end at once\n"
      with contextlib.suppress(OSError):
        os.write(2, line.encode())
    received.append(number)

  previous = {}
  with second_signal_ends():
    for number in STOPS:
      # Only the main thread may; a notebook's thread goes without.
      with contextlib.suppress(ValueError):
        previous[number] = signal.signal(number, note)
    try:
      yield received
    finally:
      for number, handler in previous.items():
        signal.signal(number, handler or signal.SIG_DFL)
