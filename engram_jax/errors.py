"""One kind of error for bad input, one clear line each.

Library code raises `InputError` for what a user can mend: a config field, an
array of the wrong shape, a file of another model; and `NonFiniteError` where a
number that is none would become a result. The programs under `experiments/`
print the message alone; every other exception is a defect and keeps its
traceback.
"""

import operator
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
    # JSON may hold halves of characters, which no terminal can be sent.
    text = text.encode("utf-8", "backslashreplace").decode()
    super().__init__(f"{field}: {text}; valid: {valid}")

  def __reduce__(self):
    # An exception is pickled by its message unless told otherwise; workers
    # send theirs over a process boundary.
    return type(self), (self.field, self.value, self.valid)


class NonFiniteError(RuntimeError):
  """A number that is not finite would become a result: which, and where.

  Not a user's mistake in one field: training diverged, or a file was damaged.
  """


def first_line(error: BaseException) -> str:
  """What an exception of others says, or its kind if it says nothing."""
  return (str(error).splitlines() or [type(error).__name__])[0]


def require(condition: Any, field: str, value: Any, valid: str) -> None:
  """Raises `InputError(field, value, valid)` unless `condition` holds.

  Args:
    condition: whether the value is as it should be.
    field: name of the field or argument, as the user knows it.
    value: the value found.
    valid: what would be valid, in words.
  """
  if not condition:
    raise InputError(field, value, valid)


def require_integer(
  field: str, value: Any, *, low: int | None = None, high: int | None = None
) -> int:
  """`value` as a Python integer; refuses all that would have to be rounded.

  Args:
    field: the name to blame.
    value: an `int`, or an integer of NumPy; no `bool`.
    low: smallest valid value; None for any.
    high: one past the largest valid value; None for any.

  Raises:
    InputError: not an integer, or outside `low <= value < high`.
  """
  bounds = f"{low} <= " * (low is not None) + "n"
  bounds += f" < {high}" * (high is not None)
  valid = "an integer" + f", {bounds}" * (bounds != "n")
  try:
    number = operator.index(value)
  except TypeError:
    raise InputError(field, repr(value), valid) from None
  ok = not isinstance(value, (bool, np.bool_))
  ok = ok and (low is None or number >= low)
  require(ok and (high is None or number < high), field, value, valid)
  return number


def require_seed(field: str, value: Any) -> int:
  """A seed that JAX and NumPy tell from every other.

  `jax.random.key` keeps 32 bits: 2**32 would draw what 0 draws, and -1 what
  2**32 - 1 does.

  Args:
    field: name of the field, for the error line.
    value: the seed to check.

  Raises:
    InputError: not an integer, or outside 0 <= seed < 2**32.
  """
  return require_integer(field, value, low=0, high=2**32)


def require_finite(name: str, values: Any) -> None:
  """Refuses numbers that are not finite, where they are known.

  Args:
    name: what they are, e.g. `gates[1]`; the place of the first is added.
    values: array or number, concrete or traced; nothing is done for the
      latter.

  Raises:
    NonFiniteError: one of them is not finite.
  """
  if isinstance(values, jax.core.Tracer):
    return
  values = np.asarray(values)
  # NumPy does not know of bfloat16 as a float.
  wrong = np.argwhere(~np.isfinite(values.astype(np.float64)))
  if len(wrong):
    place = tuple(wrong[0].tolist())
    at = f"[{', '.join(map(str, place))}]" * bool(place)
    raise NonFiniteError(f"{name}{at} is {values[place]}: not a finite number")


def first_nonfinite(tree: Any) -> str | None:
  """Name of the first array of a pytree that is not finite; None if all are.

  Every array is read: for messages only.
  """
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
      continue
    if not bool(jnp.isfinite(leaf).all()):
      return jax.tree_util.keystr(path)
  return None


def require_in_range(field: str, ids: Any, *, low: int, high: int) -> None:
  """Refuses integer ids outside `low <= id < high`, where they are known.

  Outside jit the ids are looked at, and the error names the first wrong one.
  Under a trace no value is known, and nothing is done or paid: a check in the
  compiled program is asked for by name, with `check_in_range`.

  Args:
    field: the name to blame.
    ids: integer array of any shape, concrete or traced.
    low: smallest valid id.
    high: one past the largest valid id.

  Raises:
    InputError: a concrete id lies outside the range.
  """
  if isinstance(ids, jax.core.Tracer):
    return
  values = np.asarray(ids)
  wrong = (values < low) | (values >= high)
  if wrong.any():
    raise InputError(field, values[wrong].flat[0], f"{low} <= id < {high}")


def check_in_range(field: str, ids: Any, *, low: int, high: int) -> None:
  """`require_in_range` that also works inside a compiled program.

  For functions that go through `checkify.checkify(f,
  errors=checkify.user_checks)`: the error it returns names the least id if
  that is below `low`, else the largest. It is not in the library's own path:
  a function with such a check loses JAX's fast dispatch, some milliseconds a
  call on a CPU.

  Args:
    field: the name to blame.
    ids: integer array of any shape, concrete or traced.
    low: smallest valid id.
    high: one past the largest valid id.

  Raises:
    InputError: a concrete id lies outside the range.
    ValueError: by JAX, under a trace without `checkify`.
  """
  if not isinstance(ids, jax.core.Tracer):
    return require_in_range(field, ids, low=low, high=high)
  if not ids.size:
    return None
  # A narrow dtype cannot hold the bounds; an unsigned one not the lower.
  if ids.dtype.itemsize < 4:
    ids = ids.astype(jnp.int32)
  lowest = max(low, 0) if ids.dtype.kind == "u" else low
  # Reductions only: picking an element would ask for a sharding under Explicit
  # mesh axes.
  least, most = jnp.min(ids), jnp.max(ids)
  name = field.replace("{", "{{").replace("}", "}}")
  checkify.check(
    (least >= lowest) & (most < high),
    f"{name}: {{value}}; valid: {low} <= id < {high}",
    value=jnp.where(least < lowest, least, most),
  )
  return None
