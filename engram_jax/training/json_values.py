"""Nested values as JSON keeps them, and where two of them differ first.

JSON has no NaN and no infinity. They are written as the strings "NaN",
"Infinity" and "-Infinity" (as Protocol Buffers' JSON does), which `float`
reads.
"""

import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

from engram_jax.errors import require
from engram_jax.files import open_to_read, usable

_MISSING = object()


def finite(value: Any) -> Any:
  """`value` with a string in place of each number that JSON has not."""
  if isinstance(value, dict):
    return {key: finite(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [finite(item) for item in value]
  if not isinstance(value, float) or math.isfinite(value):
    return value
  return {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")


def to_text(value: Any) -> str:
  """The text of a JSON file, with its last newline."""
  return json.dumps(finite(value), indent=2, allow_nan=False) + "\n"


def read_object(path: pathlib.Path, field: str) -> dict[str, Any]:
  """The object in a JSON file.

  Args:
    path: the file.
    field: what to blame.

  Raises:
    InputError: no such file, one that cannot be read, or other content: cut
      short, damaged, or no JSON object.
  """
  valid = "an undamaged JSON file"
  with open_to_read(path, field) as file, usable(path, valid, field=field):
    content = file.read()
  try:
    value = json.loads(content)
  except (ValueError, RecursionError) as error:
    reason = " ".join(str(error).split())
    require(False, field, path, f"{valid} ({reason})")
  require(isinstance(value, dict), field, path, f"{valid} with an object in it")
  return value


def plain(value: Any) -> Any:
  """As it comes back from JSON: tuples as lists, keys as strings."""
  return json.loads(json.dumps(finite(value), allow_nan=False))


def first_difference(
  found: Any, expected: Any, *, free: Callable[[str], bool], path: str = ""
) -> tuple[str, str, str] | None:
  """Path and both values, as texts, of the first difference; None if equal.

  Args:
    found: nested dicts, lists and scalars, as `plain` returns them.
    expected: likewise. Values of two types differ, 1 and 1.0 and True too.
    free: whether what is at a path, such as `a.b[0]`, may differ.
    path: names that lead to these values from the top.
  """
  if free(path):
    return None
  kind = type(expected)
  if kind is not type(found) or kind not in (dict, list):
    if kind is type(found) and found == expected:
      return None
    return path, _brief(found), _brief(expected)
  if kind is list:
    if len(found) != len(expected):
      return path, _brief(found), _brief(expected)
    steps = [
      (pair, f"{path}[{i}]") for i, pair in enumerate(zip(found, expected))
    ]
  else:
    prefix = f"{path}." if path else ""
    steps = [
      ((found.get(k, _MISSING), expected.get(k, _MISSING)), f"{prefix}{k}")
      for k in dict.fromkeys([*expected, *found])
    ]
  differences = (
    first_difference(*pair, free=free, path=step) for pair, step in steps
  )
  return next((d for d in differences if d is not None), None)


def _brief(value: Any) -> str:
  text = "missing" if value is _MISSING else json.dumps(value)
  return text if len(text) <= 70 else f"{text[:67]}..."
