"""How far long work has come: a bar, or a plain line at times."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import tqdm

#: Seconds between two lines where there is no terminal.
SECONDS = 10.0


@contextlib.contextmanager
def reporting(
  what: str,
  *,
  total: int | None,
  unit: str = "B",
  enabled: bool = True,
  seconds: float = SECONDS,
) -> Iterator[Callable[[int], None]]:
  """A function that is told how much more is done; says it on standard error.

  On a terminal a bar with the speed and the time left, which goes away at the
  end; elsewhere a line every so many seconds, none for what is done by then.

  Args:
    what: is done, for a person.
    total: amount of work in all; None if unknown.
    unit: what is counted; `B` for bytes, which are shown as megabytes.
    enabled: False to say nothing.
    seconds: between two lines.
  """
  if not enabled:
    yield lambda count: None
    return
  if sys.stderr is not None and sys.stderr.isatty():
    scale = unit == "B"
    unit = unit if scale else f" {unit}"
    options = dict(unit=unit, unit_scale=scale, leave=False, delay=0.5)
    with tqdm.tqdm(total=total or None, desc=what, **options) as bar:
      yield bar.update
    return
  start = last = time.monotonic()
  done = 0

  def advance(count: int) -> None:
    nonlocal done, last
    done += count
    now = time.monotonic()
    if now - last >= seconds:
      last = now
      line = _line(what, done, total, unit, now - start)
      print(line, file=sys.stderr, flush=True)

  yield advance


def _line(
  what: str, done: int, total: int | None, unit: str, elapsed: float
) -> str:
  speed = done / elapsed if elapsed else 0.0
  left = max(total - done, 0) / speed if total and speed else None
  if unit == "B":
    done, total, speed = done / 1e6, total and total / 1e6, speed / 1e6
    unit = "MB"
  digits = ",.1f" if unit == "MB" else ",d"
  of = f" of {total:{digits}}" if total else ""
  line = f"{what}: {done:{digits}}{of} {unit}, {speed:,.2f} {unit}/s"
  return line if left is None else f"{line}, {left:,.0f} s left"
