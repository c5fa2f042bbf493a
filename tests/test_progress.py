"""What long work says of itself: to standard error, in lines or as a bar."""

import io
import re
import sys
import threading

import pytest

from engram_jax import progress


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def said(capsys):
  """What is on standard error so far."""
  return lambda: capsys.readouterr().err


def test_bytes_have_a_speed_and_the_time_left(said):
  with progress.counting(
    "Reading", total=4_000_000, unit="B", every=0.0
  ) as update:
    update(1_000_000)
    update(3_000_000)
  first, last = said().splitlines()
  assert re.fullmatch(
    r"Reading: 1\.0 of 4\.0 MB, .+ s, [\d,.]+ MB/s, about .+ left", first
  )
  assert last.startswith("Reading: 4.0 of 4.0 MB, ") and "left" not in last


def test_items_are_counted_as_they_are_asked_for(said):
  items = progress.counted("abc", "reading", total=3, unit="letters", every=0.0)
  assert list(items) == ["a", "b", "c"]
  text = said()
  lines = text.splitlines()
  assert lines[0].startswith("reading: 1 of 3 letters, ")
  assert lines[0].endswith(" left") and "left" not in lines[-1]
  assert lines[-1].startswith("reading: 3 of 3 letters, ")
  assert "\r" not in text


def test_an_unknown_total_has_no_estimate(said):
  with progress.counting("reading", every=0.0) as update:
    update(1000)
  text = said()
  assert text.startswith("reading: 1,000 steps, ")
  assert "left" not in text and " of " not in text


def test_nothing_done_is_no_division_by_zero(said):
  with progress.counting("reading", total=0, unit="B", every=0.0) as update:
    update(0)
  assert said().startswith("reading: 0.0 MB, 0 s")


def test_the_end_is_told_of_an_error_too(said):
  with pytest.raises(KeyError):
    with progress.counting("reading", total=9, every=0.0) as update:
      update(2)
      raise KeyError
  assert said().splitlines()[-1].startswith("reading: 2 of 9 steps")


@pytest.mark.parametrize("unit", ["B", "letters"])
def test_a_bar_on_a_terminal(monkeypatch, unit):
  monkeypatch.setattr(sys, "stderr", out := Terminal())
  with progress.counting("reading", total=10, unit=unit, every=0.0) as update:
    update(10)
  assert "\n" not in out.getvalue()  # it leaves no line behind


@pytest.mark.parametrize("options", ({"enabled": False}, {"every": 1e9}))
def test_nothing_is_said(said, options):
  with progress.counting("Reading", total=10, **options) as update:
    update(10)
  assert said() == ""


def test_a_closed_standard_error_is_no_error(monkeypatch):
  monkeypatch.setattr(sys, "stderr", None)
  assert list(progress.counted("ab", "reading", every=0.0)) == ["a", "b"]
  with progress.waiting("compiling"):
    progress.say("large")


def test_what_cannot_be_counted_is_said_to_go_on(monkeypatch):
  class Waits(io.StringIO):
    """Ends the wait when it was told of."""

    def write(self, text):
      if "so far" in text:
        told.set()
      return super().write(text)

  told, out = threading.Event(), Waits()
  monkeypatch.setattr(sys, "stderr", out)
  with progress.waiting("compiling", every=0.01):
    assert told.wait(60)
  lines = out.getvalue().splitlines()
  assert lines[0] == "compiling ..."
  assert lines[1].startswith("compiling: ") and lines[1].endswith(" so far")
  assert not lines[-1].endswith("so far")
  with pytest.raises(ZeroDivisionError), progress.waiting("x"):
    raise ZeroDivisionError


def test_nothing_is_on_standard_output(capsys):
  progress.say("large")
  list(progress.counted("abc", "reading", every=0.0))
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
    (7 * 2**19, "3.5 MiB"),
    (120 * 2**30, "120.0 GiB"),
    (5000 * 2**40, "5000.0 TiB"),
  ],
)
def test_sizes(count, text):
  assert progress.size(count) == text


@pytest.mark.parametrize(
  "seconds, text",
  [(0.4, "0 s"), (59.4, "59 s"), (200.0, "3 min 20 s"), (7500.0, "2 h 5 min")],
)
def test_durations(seconds, text):
  assert progress.duration(seconds) == text
