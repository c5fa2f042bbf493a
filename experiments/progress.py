"""How far a program is and how long it will take, on standard error.

A bar on a terminal; elsewhere, as in a log, a plain line every some seconds.
Nothing of it is on standard output, which is for results.
"""

import contextlib
import math
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, TypeVar

import tqdm

#: Seconds between two lines where there is no terminal.
EVERY = 10.0

T = TypeVar("T")


def say(line: str) -> None:
  """A line of what is done, or of what is known to be large."""
  print(line, file=sys.stderr, flush=True)


class Progress:
  """What is done of something; see `counting`.

  Attributes:
    done: work done so far, of `total`.
  """

  def __init__(
    self,
    what: str,
    *,
    total: int | None,
    unit: str,
    every: float,
    file: TextIO,
  ):
    """Shows nothing yet of what may end at once."""
    self.done, self._what, self._total = 0, what, total
    self._unit, self._every, self._file = unit, every, file
    self._began = self._told = time.monotonic()
    self._bar = None
    if file.isatty():
      self._bar = tqdm.tqdm(desc=what, total=total, unit=unit, file=file)

  def update(self, count: int = 1) -> None:
    """Counts what was done since the last call."""
    self.done += count
    if self._bar is not None:
      self._bar.update(count)
      return
    now = time.monotonic()
    if now - self._told >= self._every:
      self._told = now
      self._tell(now - self._began)

  def close(self) -> None:
    """Ends the bar, or tells the end of what has been told of."""
    if self._bar is not None:
      self._bar.close()
    elif self._told > self._began:
      self._tell(time.monotonic() - self._began)

  def _tell(self, spent: float) -> None:
    total, text = self._total, f"{self.done:,}"
    if total is not None:
      text += f" of {total:,}"
    text = f"{self._what}: {text} {self._unit}, {duration(spent)}"
    if total is not None and 0 < self.done < total:
      left = spent * (total - self.done) / self.done
      text += f", about {duration(left)} left"
    print(text, file=self._file, flush=True)


@contextlib.contextmanager
def counting(
  what: str,
  *,
  total: int | None = None,
  unit: str = "steps",
  every: float = EVERY,
  file: TextIO | None = None,
) -> Iterator[Progress]:
  """Something to be counted with `update`.

  Args:
    what: is done, in a word or two.
    total: number of units; None if it is unknown.
    unit: name of the units.
    every: seconds between two lines where there is no terminal.
    file: where to tell it; None for standard error.
  """
  shown = Progress(
    what, total=total, unit=unit, every=every, file=file or sys.stderr
  )
  try:
    yield shown
  finally:
    shown.close()


def counted(items: Iterable[T], what: str, **options: Any) -> Iterator[T]:
  """The items, counted as they are asked for; options as of `counting`."""
  with counting(what, **options) as shown:
    for item in items:
      yield item
      shown.update()


@contextlib.contextmanager
def waiting(
  what: str,
  *,
  announce: bool = True,
  every: float = EVERY,
  file: TextIO | None = None,
) -> Iterator[None]:
  """Says that a step has begun that cannot be counted, and that it goes on.

  Args:
    what: is done, in some words.
    announce: say so at once; False for what is most often short.
    every: seconds between two lines.
    file: where to tell it; None for standard error.
  """
  out, ended, began = file or sys.stderr, threading.Event(), time.monotonic()
  told = []

  def tell() -> None:
    while not ended.wait(every):
      told.append(True)
      spent = duration(time.monotonic() - began)
      print(f"{what}: {spent} so far", file=out, flush=True)

  if announce:
    print(f"{what} ...", file=out, flush=True)
  thread = threading.Thread(target=tell, daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()
    if told:
      spent = duration(time.monotonic() - began)
      print(f"{what}: {spent}", file=out, flush=True)


def duration(seconds: float) -> str:
  """Seconds in words: 7 s, 3 min 20 s, 2 h 5 min."""
  whole = round(seconds)
  if whole < 60:
    return f"{whole} s"
  if whole < 3600:
    return f"{whole // 60} min {whole % 60} s"
  return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: float) -> str:
  """Bytes in words: 512 bytes, 3.4 MiB, 120.0 GiB."""
  if count < 1024:
    return f"{count:.0f} bytes"
  power = min(int(math.log2(count)) // 10, 4)
  return f"{count / 1024**power:.1f} {'KMGT'[power - 1]}iB"
