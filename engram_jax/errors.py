"""One kind of error for bad input, one clear line each.

Library code raises `InputError` for what a user can mend: a config field, an
array of the wrong shape, a file of another model. The programs under
`experiments/` print its message alone; every other exception is a defect and
keeps its traceback.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify


class InputError(ValueError):
  """Bad input: which field, the value found, and what would be valid.

  Attributes:
    field: the name of the argument, config field or file, e.g. `"heads"`.
    value: what was found there.
    valid: what would be accepted, in words.
  """

  def __init__(self, field: str, value: Any, valid: str):
    self.field, self.value, self.valid = field, value, valid
    # Arrays and long values would break the promise of one line.
    text = " ".join(str(value).split())
    text = text if len(text) <= 120 else text[:117] + "..."
    super().__init__(f"{field}: {text}; valid: {valid}")


def require(condition: Any, field: str, value: Any, valid: str) -> None:
  """Raises `InputError(field, value, valid)` unless `condition` holds."""
  if not condition:
    raise InputError(field, value, valid)


def require_in_range(field: str, ids: Any, *, low: int, high: int) -> None:
  """Refuses integer ids outside `low <= id < high`, inside and outside jit.

  Outside jit the ids are looked at and an `InputError` names the first wrong
  one. Under a trace no value is known: there the check is a
  `checkify.debug_check`, which costs nothing in a plain `jit` and is raised by
  `checkify.checkify(f, errors=checkify.user_checks)`.

  Args:
    field: the name to blame.
    ids: integer array of any shape, concrete or traced.
    low: smallest valid id.
    high: one past the largest valid id.

  Raises:
    InputError: a concrete id lies outside the range.
  """
  if isinstance(ids, jax.core.Tracer):
    if ids.size:
      wrong = (ids < low) | (ids >= high)
      checkify.debug_check(
        ~jnp.any(wrong),
        f"{field}: {{value}}; valid: {low} <= id < {high}",
        value=ids.reshape(-1)[jnp.argmax(wrong.reshape(-1))],
      )
    return
  values = np.asarray(ids)
  wrong = (values < low) | (values >= high)
  if wrong.any():
    raise InputError(field, values[wrong].flat[0], f"{low} <= id < {high}")
