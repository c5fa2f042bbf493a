"""Flags of numbers: what is taken, what is refused."""

import pytest
from absl import flags

from experiments import number_flags


@pytest.fixture
def values(monkeypatch):
  """Two flags among no others."""
  values = flags.FlagValues()
  define = flags.DEFINE
  monkeypatch.setattr(
    flags, "DEFINE", lambda *x, **y: define(*x, flag_values=values, **y)
  )
  number_flags.define("rows", [1, 2], "Of a table.")
  number_flags.define("rates", [], "Tried.", kind=float)
  return values


def test_numbers_are_read_as_python_does(values):
  values(["program"])
  assert values.rows == [1, 2] and values.rates == []
  values(["program", "--rows=1_000, -3", "--rates=1e-3,2"])
  assert values.rows == [1000, -3] and values.rates == [0.001, 2.0]
  values(["program", "--rows="])
  assert values.rows == []


def test_a_default_that_comes_later(values):
  values(["program", "--rates=3"])
  for name in ("rows", "rates"):
    values.set_default(name, [7])
  assert values.rows == [7] and values.rates == [3.0]


@pytest.mark.parametrize(
  "argument", ["--rows=1,x", "--rows=1.5", "--rows=1,,2", "--rates=fast"]
)
def test_another_word_is_refused_in_one_line(values, argument):
  name, _, text = argument[2:].partition("=")
  kind = "integers" if name == "rows" else "numbers"
  pattern = f"^flag --{name}={text}: must be {kind} separated by commas$"
  with pytest.raises(flags.IllegalFlagValueError, match=pattern):
    values(["program", argument])
