"""Tests of what long work says of itself."""

import io
import re
import sys

import pytest

from engram_jax.progress import reporting


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_plain_lines_where_there_is_no_terminal(monkeypatch):
  monkeypatch.setattr(sys, "stderr", out := io.StringIO())
  with reporting("Reading", total=4_000_000, seconds=0.0) as advance:
    advance(1_000_000)
    advance(3_000_000)
  first, last = out.getvalue().splitlines()
  assert re.fullmatch(
    r"Reading: 1\.0 of 4\.0 MB, [\d,.]+ MB/s, [\d,]+ s left", first
  )
  assert last.startswith("Reading: 4.0 of 4.0 MB, ")
  assert last.endswith(" 0 s left")


def test_other_units_and_an_unknown_total(monkeypatch):
  monkeypatch.setattr(sys, "stderr", out := io.StringIO())
  with reporting("Rating", total=None, unit="batches", seconds=0.0) as advance:
    advance(3)
  assert re.fullmatch(r"Rating: 3 batches, [\d,.]+ batches/s\n", out.getvalue())


def test_a_bar_on_a_terminal(monkeypatch):
  monkeypatch.setattr(sys, "stderr", out := Terminal())
  with reporting("Reading", total=10, seconds=0.0) as advance:
    advance(10)
  assert "\n" not in out.getvalue()  # it leaves no line behind


@pytest.mark.parametrize("options", ({"enabled": False}, {"seconds": 1e9}))
def test_nothing_is_said(monkeypatch, options):
  monkeypatch.setattr(sys, "stderr", out := io.StringIO())
  with reporting("Reading", total=10, **options) as advance:
    advance(10)
  assert out.getvalue() == ""
