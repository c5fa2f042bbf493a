"""What rows and exports are made from, as JSON and as texts."""

import pytest

from engram_jax.errors import InputError
from engram_jax.identity import WeightsIdentity

IDENTITY = WeightsIdentity("ab" * 32, 12, "cd" * 32)


def test_it_comes_back_from_json_and_from_texts():
  assert WeightsIdentity.from_dict(IDENTITY.to_dict()) == IDENTITY
  texts = {"format": "pt"} | IDENTITY.to_metadata()
  assert all(type(text) is str for text in texts.values())
  assert WeightsIdentity.from_metadata(texts) == IDENTITY
  assert WeightsIdentity.from_metadata({"format": "pt"}) is None


@pytest.mark.parametrize(
  "change, match",
  [
    ({"run": "ab"}, "made_from.run: ab; valid: 64 hex"),
    ({"weights": "AB" * 32}, "made_from.weights"),
    ({"weights": None}, "made_from.weights: None"),
    ({"step": -1}, "made_from.step: -1"),
    ({"step": True}, "made_from.step: True"),
    ({"step": 2**63}, "made_from.step"),
    ({"more": 1}, r"made_from: \['more', 'run'"),
  ],
)
def test_what_it_cannot_be_is_refused_by_name(change, match):
  with pytest.raises(InputError, match=match):
    WeightsIdentity.from_dict(IDENTITY.to_dict() | change)


@pytest.mark.parametrize("fields", [None, [], "x", {}])
def test_other_things_are_refused(fields):
  with pytest.raises(InputError, match=r"^made_from: "):
    WeightsIdentity.from_dict(fields)


@pytest.mark.parametrize("step", ["", "-1", "1.5", "9" * 5000, "\u0663"])
def test_texts_that_are_no_step_are_refused(step):
  with pytest.raises(InputError, match=r"^made_from\.step: "):
    WeightsIdentity.from_metadata(
      IDENTITY.to_metadata() | {"engram.step": step}
    )
