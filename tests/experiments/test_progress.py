"""What programs tell of how far they are: to standard error, in lines."""

import io

import pytest

from experiments import progress


class Terminal(io.StringIO):
  """A file that is a terminal."""

  def isatty(self):
    return True


def test_lines_where_there_is_no_terminal():
  out = io.StringIO()
  items = progress.counted(
    "abc", "reading", total=3, unit="letters", every=0, file=out
  )
  assert list(items) == ["a", "b", "c"]
  lines = out.getvalue().splitlines()
  assert lines[0].startswith("reading: 1 of 3 letters, ")
  assert " left" in lines[0] and "left" not in lines[-1]
  assert lines[-1].startswith("reading: 3 of 3 letters, ")
  assert "\r" not in out.getvalue()


def test_what_ends_at_once_says_nothing():
  out = io.StringIO()
  list(progress.counted(range(5), "reading", total=5, file=out))
  assert out.getvalue() == ""


def test_an_unknown_total_has_no_estimate():
  out = io.StringIO()
  with progress.counting("reading", every=0, file=out) as shown:
    shown.update(1000)
  assert out.getvalue().startswith("reading: 1,000 steps, ")
  assert "left" not in out.getvalue() and " of " not in out.getvalue()


def test_a_bar_on_a_terminal():
  out = Terminal()
  list(progress.counted("abc", "reading", total=3, unit="letters", file=out))
  assert "reading" in out.getvalue() and "3/3" in out.getvalue()


def test_what_cannot_be_counted_is_said_to_go_on():
  class Waits(io.StringIO):
    """Ends the wait when it was told of."""

    def write(self, text):
      if "so far" in text:
        told.set()
      return super().write(text)

  import threading

  told, out = threading.Event(), Waits()
  with progress.waiting("compiling", every=0.01, file=out):
    assert told.wait(60)
  lines = out.getvalue().splitlines()
  assert lines[0] == "compiling ..."
  assert lines[1].startswith("compiling: ") and lines[1].endswith(" so far")
  assert not lines[-1].endswith("so far")
  with pytest.raises(ZeroDivisionError), progress.waiting("x", file=out):
    raise ZeroDivisionError


def test_nothing_is_on_standard_output(capsys):
  progress.say("large")
  list(progress.counted("abc", "reading", every=0))
  with progress.waiting("waiting"):
    pass
  found = capsys.readouterr()
  assert found.out == "" and "large" in found.err and "reading" in found.err


@pytest.mark.parametrize(
  "count, text",
  [
    (0, "0 bytes"),
    (1023, "1023 bytes"),
    (1024, "1.0 KiB"),
    (3.5 * 2**20, "3.5 MiB"),
    (120 * 2**30, "120.0 GiB"),
    (5000 * 2**40, "5000.0 TiB"),
  ],
)
def test_sizes(count, text):
  assert progress.size(count) == text


@pytest.mark.parametrize(
  "seconds, text",
  [(0.4, "0 s"), (59.4, "59 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_durations(seconds, text):
  assert progress.duration(seconds) == text
