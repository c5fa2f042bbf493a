"""How far long work has come and how long it will take, on standard error.

A bar on a terminal; elsewhere, as in a log, a plain line every some seconds.
What ends before the first line says nothing. Nothing of it is on standard
output, which is for results.
"""

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import tqdm

#: Seconds between two lines where there is no terminal.
EVERY = 10.0

T = TypeVar("T")


def say(line: str) -> None:
  """A line of what is done, or of what is known to be large."""
  if sys.stderr is not None:
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def counting(
  what: str,
  *,
  total: int | None = None,
  unit: str = "steps",
  enabled: bool = True,
  every: float = EVERY,
) -> Iterator[Callable[[int], None]]:
  """A function to be called with how much more is done.

  Args:
    what: name of the work, in a word or two.
    total: number of units; None if it is unknown.
    unit: name of the units; `B` for bytes, which are shown as megabytes.
    enabled: False to say nothing.
    every: seconds between two lines where there is no terminal.
  """
  if not enabled or sys.stderr is None:
    yield lambda count=1: None
    return
  if sys.stderr.isatty():
    is_bytes = unit == "B"
    with tqdm.tqdm(
      desc=what,
      total=total or None,
      unit=unit if is_bytes else f" {unit}",
      unit_scale=is_bytes,
      leave=False,
      delay=0.5,
    ) as bar:
      yield lambda count=1: bar.update(count)
    return
  began = last = time.monotonic()
  done, told = 0, None

  def tell() -> None:
    nonlocal last, told
    last, told = time.monotonic(), done
    say(_line(what, done, total, unit, last - began))

  def update(count: int = 1) -> None:
    nonlocal done
    done += count
    if time.monotonic() - last >= every:
      tell()

  try:
    yield update
  finally:
    # What was begun to be told of has an end.
    if told not in (None, done):
      tell()


def counted(items: Iterable[T], what: str, **options: Any) -> Iterator[T]:
  """The items, counted as they are asked for.

  Args:
    items: whatever is to be counted.
    what: what is done with them, in a word or two.
    **options: other arguments of `counting`.
  """
  with counting(what, **options) as update:
    for item in items:
      yield item
      update(1)


@contextlib.contextmanager
def waiting(
  what: str, *, announce: bool = True, every: float = EVERY
) -> Iterator[None]:
  """Says that a step has begun that cannot be counted, and that it goes on.

  Args:
    what: name of the work, in some words.
    announce: say so at once; False for what is most often short.
    every: seconds between two lines.
  """
  ended, began, told = threading.Event(), time.monotonic(), []

  def tell() -> None:
    while not ended.wait(every):
      told.append(True)
      say(f"{what}: {duration(time.monotonic() - began)} so far")

  if announce:
    say(f"{what} ...")
  thread = threading.Thread(target=tell, daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()
    if told:
      say(f"{what}: {duration(time.monotonic() - began)}")


def duration(seconds: float) -> str:
  """Seconds in words: 7 s, 3 min 20 s, 2 h 5 min."""
  whole = round(seconds)
  if whole < 60:
    return f"{whole} s"
  if whole < 3600:
    return f"{whole // 60} min {whole % 60} s"
  return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: int) -> str:
  """Bytes in words: 512 bytes, 3.4 MiB, 120.0 GiB."""
  if count < 1024:
    return f"{count:.0f} bytes"
  power = min(int(math.log2(count)) // 10, 4)
  return f"{count / 1024**power:.1f} {'KMGT'[power - 1]}iB"


def _line(
  what: str, done: int, total: int | None, unit: str, spent: float
) -> str:
  """`Reading: 1.0 of 4.0 MB, 10 s, 0.10 MB/s, about 30 s left`."""
  left, digits = None, ",d"
  if total and 0 < done < total:
    left = spent * (total - done) / done
  if is_bytes := unit == "B":
    done, total = done / 1e6, total and total / 1e6
    unit, digits = "MB", ",.1f"
  of = f" of {total:{digits}}" if total else ""
  line = f"{what}: {done:{digits}}{of} {unit}, {duration(spent)}"
  if is_bytes and spent:
    line += f", {done / spent:,.2f} MB/s"
  return line if left is None else f"{line}, about {duration(left)} left"
