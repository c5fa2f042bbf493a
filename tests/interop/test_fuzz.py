"""Damaged files, a few hundred; as many as one likes with

FUZZ_CASES=10000 python -m pytest tests/interop/test_fuzz.py -k ends_well
"""

import os

import pytest

from engram_jax.errors import InputError
from tests.interop import fuzzing

COUNT = int(os.environ.get("FUZZ_CASES", "300"))
SEED = int(os.environ.get("FUZZ_SEED", "1"))


@pytest.fixture(scope="module")
def result():
  return fuzzing.fuzz(COUNT, seed=SEED)


def test_every_case_ends_well(result):
  assert not result["failures"]
  ends = {end for ends in result["outcomes"].values() for end in ends}
  assert ends == set(fuzzing.GOOD)
  total = sum(sum(ends.values()) for ends in result["outcomes"].values())
  assert total == COUNT


def test_the_damage_is_felt(result):
  for name, ends in result["outcomes"].items():
    assert sum(ends.values()) > 15, name
    # Changed rows of a checkpoint are rows like others: it has no checksums.
    assert ends.get("refused", 0) + ends.get("noticed", 0) > 5, name
  assert result["messages"]["safetensors, header"]


@pytest.mark.parametrize(
  "error, outcome",
  [
    (InputError("field", 1, "2"), "refused"),
    (InputError("two\nlines", 1, "2"), "several lines"),
    (InputError("\ud800", 1, "2"), "not printable"),
    (KeyError("x"), "KeyError"),
  ],
)
def test_bad_ends_would_be_seen(error, outcome):
  def case(draw):
    raise error

  assert fuzzing.outcome_of(case, None)[0] == outcome


def test_a_hang_would_be_seen(monkeypatch):
  monkeypatch.setattr(fuzzing, "TIME_LIMIT", 1)

  def case(draw):
    while True:
      pass

  assert fuzzing.outcome_of(case, None)[0] == "hang"


def test_a_wrong_row_would_be_seen(monkeypatch):
  # Readers that shift every row by one byte.
  right = fuzzing.RowFile.read

  def shifted(self, layer, ids, out):
    right(self, layer, ids, out)
    out[...] = out.ravel()[::-1].reshape(out.shape)

  monkeypatch.setattr(fuzzing.RowFile, "read", shifted)
  result = fuzzing.fuzz(40)
  assert any("wrong row" in ends for ends in result["outcomes"].values())


def test_refuses_no_cases():
  with pytest.raises(InputError, match=r"^count: 0; valid: an integer >= 1"):
    fuzzing.fuzz(0)
