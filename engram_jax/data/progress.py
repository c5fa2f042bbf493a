"""How far the reading of a text has come: a bar, or a plain line at times."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import tqdm

#: Seconds between two lines where there is no terminal.
SECONDS = 10.0


@contextlib.contextmanager
def text_progress(
  what: str, *, total: int | None, enabled: bool, seconds: float = SECONDS
) -> Iterator[Callable[[int], None]]:
  """A function that is told how many bytes of text are done.

  On a terminal a bar with the speed and the time left, which goes away at the
  end; elsewhere a line every so many seconds, none for what is done by then.

  Args:
    what: is done, for a person.
    total: bytes of text in all; None if unknown.
    enabled: False to say nothing.
    seconds: between two lines.
  """
  if not enabled:
    yield lambda count: None
    return
  if sys.stderr is not None and sys.stderr.isatty():
    options = dict(unit="B", unit_scale=True, leave=False, delay=0.5)
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
      print(_line(what, done, total, now - start), file=sys.stderr, flush=True)

  yield advance


def _line(what: str, done: int, total: int | None, elapsed: float) -> str:
  speed = done / elapsed
  parts = [f"{what}: {done / 1e6:,.1f}"]
  parts[0] += f" of {total / 1e6:,.1f} MB" if total else " MB"
  parts.append(f"{speed / 1e6:.2f} MB/s")
  if total and speed:
    parts.append(f"{max(total - done, 0) / speed:,.0f} s left")
  return ", ".join(parts)
