"""Configs as nested dictionaries and back: JSON, files, `--config.x.y=z`.

A field that is unknown, missing or of another type is refused by its path. In
what an earlier version has saved, fields that did not exist then are given
their defaults, in one line that says so (`completed`).
"""

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from absl import logging

from engram_jax.errors import InputError, require


def to_dict(config: Any) -> dict[str, Any]:
  """The config as nested dicts, lists and scalars, ready for JSON."""

  def plain(value):
    if isinstance(value, dict):
      return {key: plain(item) for key, item in value.items()}
    return [plain(v) for v in value] if isinstance(value, tuple) else value

  return plain(dataclasses.asdict(config))


def from_dict(cls: type, values: Mapping[str, Any], *, path: str = "") -> Any:
  """Makes the config `cls` of nested mappings, refusing what does not fit.

  Args:
    cls: a dataclass, such as those of `config.py`.
    values: field names to values; sequences become tuples.
    path: where `values` stands in the whole, for messages.

  Raises:
    InputError: an unknown or missing field, a value of another type, or a
      value that the dataclass itself refuses. The message names the field.
  """
  prefix = f"{path}." if path else ""
  hints = typing.get_type_hints(cls)
  _require_known(values, hints, prefix)
  missing = [
    field.name
    for field in dataclasses.fields(cls)
    if field.name not in values and field.default is dataclasses.MISSING
  ]
  if missing:
    raise InputError(f"{prefix}{missing[0]}", "missing", "a value")
  arguments = {
    name: _typed(hints[name], value, f"{prefix}{name}")
    for name, value in values.items()
  }
  try:
    return cls(**arguments)
  except InputError as error:
    raise InputError(prefix + error.field, error.value, error.valid) from None


def for_digest(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
  """What a digest of a config is made of, which new fields must not change.

  Args:
    cls: the dataclass of the config.
    values: nested dicts, as of `to_dict`.

  Returns:
    A copy without the fields that `cls` marks as later than the first digests,
    where they have their defaults.
  """
  hints = typing.get_type_hints(cls)
  fields = {field.name: field for field in dataclasses.fields(cls)}
  kept = {}
  for name, value in values.items():
    field, group = fields[name], _group(hints[name])
    if field.metadata.get("later") and value == field.default:
      continue
    if group is not None and value is not None:
      value = for_digest(group, value)
    kept[name] = value
  return kept


def completed(
  cls: type, values: Mapping[str, Any], *, source: str
) -> dict[str, Any]:
  """A saved config, with the defaults of fields that were added since.

  What has been filled in is said in one line, once in a process.

  Args:
    cls: the dataclass of the config.
    values: nested dicts, as `to_dict` made them then.
    source: the file, for messages.

  Returns:
    A copy; a field without a default stays missing.

  Raises:
    InputError: a field that is not, or no longer, one of `cls`.
  """
  filled: list[str] = []
  found = _complete(cls, values, "", filled, source)
  if filled:
    _tell(
      f"{', '.join(filled)}: newer than this run's config; "
      f"the default{'s are' if len(filled) > 1 else ' is'} used"
    )
  return found


@functools.cache
def _tell(line: str) -> None:
  logging.warning("%s", line)


def _complete(cls, values, path, filled, source) -> dict[str, Any]:
  prefix = f"{path}." if path else ""
  require(isinstance(values, Mapping), path or source, values, "a config")
  hints = typing.get_type_hints(cls)
  _require_known(values, hints, prefix, f" in {source}")
  found = dict(values)
  for field in dataclasses.fields(cls):
    name, group = field.name, _group(hints[field.name])
    default = field.default
    if name not in values and default is not dataclasses.MISSING:
      found[name] = (
        to_dict(default)
        if dataclasses.is_dataclass(default)
        else list(default)
        if isinstance(default, tuple)
        else default
      )
      filled.append(f"{prefix}{name} = {found[name]!r}")
    elif group is not None and values.get(name) is not None:
      found[name] = _complete(
        group, values[name], f"{prefix}{name}", filled, source
      )
  return found


def _group(hint: Any) -> type | None:
  """The dataclass that a field holds, or may hold; None if it holds none."""
  hints = typing.get_args(hint) if isinstance(hint, types.UnionType) else [hint]
  return next((x for x in hints if dataclasses.is_dataclass(x)), None)


def _require_known(values, hints, prefix: str, where: str = "") -> None:
  for name in values:
    if name not in hints:
      close = difflib.get_close_matches(name, hints, n=1)
      valid = f"did you mean {close[0]}?" if close else ", ".join(hints)
      raise InputError(f"{prefix}{name}", f"unknown field{where}", valid)


def _typed(hint: Any, value: Any, path: str) -> Any:
  """`value` as the annotation `hint` wants it, or an `InputError`."""
  if isinstance(hint, types.UnionType):
    if value is None:
      return None
    (hint,) = (arg for arg in typing.get_args(hint) if arg is not type(None))
  if dataclasses.is_dataclass(hint):
    if isinstance(value, hint):
      return value
    require(isinstance(value, Mapping), path, value, "a group of fields")
    return from_dict(hint, value, path=path)
  if typing.get_origin(hint) is tuple:
    ok = isinstance(value, (list, tuple))
    require(ok, path, value, "a sequence of numbers")
    item = typing.get_args(hint)[0]
    return tuple(_typed(item, v, f"{path}[{i}]") for i, v in enumerate(value))
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    require(abs(value) < 2**1000, path, value, "a finite number")
    value = float(value)
  if hint is float and isinstance(value, float):
    # JSON, which keeps the configs, has no other ones.
    require(math.isfinite(value), path, value, "a finite number")
  ok = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
  require(ok, path, repr(value), hint.__name__)
  return value
