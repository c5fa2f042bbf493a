"""What packed rows and exported weights are made from: a run, a step, arrays.

Two runs of one config have tables of the same shape under the same hash, and so
have two steps of one run: nothing in the rows themselves tells them apart. So a
file of them carries an identity, which is compared with the checkpoint's.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from engram_jax.errors import InputError, require

_HEX = set("0123456789abcdef")


@dataclasses.dataclass(frozen=True)
class WeightsIdentity:
  """The weights of one checkpoint.

  Attributes:
    run: digest of what stays the same through a run: its config, its hash and
      the digests of its tokenizer, compression and text; 64 hexadecimal digits.
    step: number of steps taken.
    weights: digest of the parameters and tables; 64 hexadecimal digits.

  Raises:
    InputError: a field that is not as above.
  """

  run: str
  step: int
  weights: str

  def __post_init__(self):
    """Refuses what no checkpoint has."""
    _require_possible(self.to_dict())

  def to_dict(self) -> dict[str, Any]:
    """Ready for JSON."""
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, fields: Any) -> "WeightsIdentity":
    """The identity of `to_dict`'s result.

    Args:
      fields: what JSON gave, which may be anything.

    Raises:
      InputError: other fields, or values that cannot be theirs.
    """
    names = sorted(field.name for field in dataclasses.fields(cls))
    found = type(fields).__name__
    if isinstance(fields, dict):
      found = sorted(map(str, fields))
    require(found == names, "made_from", found, f"fields {names}")
    _require_possible(fields)  # before any type is taken for granted
    return cls(**fields)

  def to_metadata(self) -> dict[str, str]:
    """As texts, which is what the header of a safetensors file may hold."""
    return {f"engram.{name}": str(x) for name, x in self.to_dict().items()}

  @classmethod
  def from_metadata(
    cls, metadata: Mapping[str, str]
  ) -> "WeightsIdentity | None":
    """The identity of `to_metadata` among other texts; None if there is none.

    Raises:
      InputError: a part of it is missing, or cannot be.
    """
    prefix = "engram."
    fields: dict[str, Any] = {
      name.removeprefix(prefix): text
      for name, text in metadata.items()
      if name.startswith(prefix)
    }
    if not fields:
      return None
    step = str(fields.get("step", ""))
    # Longer ones are no number of steps, and slow to parse.
    if step.isascii() and step.isdecimal() and len(step) < 20:
      fields["step"] = int(step)
    return cls.from_dict(fields)


def _require_possible(fields: Mapping[str, Any]) -> None:
  for name in ("run", "weights"):
    value = fields[name]
    ok = type(value) is str and len(value) == 64 and set(value) <= _HEX
    require(ok, f"made_from.{name}", value, "64 hexadecimal digits")
  step = fields["step"]
  ok = type(step) is int and 0 <= step < 2**63
  require(ok, "made_from.step", step, "a number of steps, >= 0")


def require_same_weights(
  found: WeightsIdentity,
  wanted: WeightsIdentity,
  where: Any,
  *,
  allow_other_step: bool = False,
) -> None:
  """Refuses weights that are not those of a checkpoint.

  Args:
    found: what the file or folder says of itself.
    wanted: the checkpoint's.
    where: the file or folder, for the message.
    allow_other_step: take those of another step of the same run.

  Raises:
    InputError: another run, another step or other weights: the first of these
      that differs, with both values.
  """
  if found.weights == wanted.weights:
    return
  for name, mine in wanted.to_dict().items():
    other, valid = getattr(found, name), f"{mine}, the checkpoint's"
    if name == "step" and other != mine:
      if allow_other_step:
        return
      valid += "; or allow_other_step, to take them all the same"
    if other != mine:
      raise InputError(f"{name} of {where}", other, valid)
