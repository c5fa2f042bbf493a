"""Flags that hold numbers, separated by commas."""

from collections.abc import Sequence

from absl import flags


class _Numbers(flags.ListParser):
  """Commas and numbers, or a sequence of numbers."""

  def __init__(self, kind: type[int] | type[float]):
    super().__init__()
    self._kind = kind

  def parse(self, argument: str | Sequence[float]) -> list[int] | list[float]:
    name = {int: "integers", float: "numbers"}[self._kind]
    try:
      return [self._kind(text) for text in super().parse(argument)]
    except ValueError:
      raise ValueError(f"must be {name} separated by commas") from None

  def flag_type(self) -> str:
    return f"comma separated list of {self._kind.__name__}"


def define(
  name: str,
  default: Sequence[float],
  help: str,
  *,
  kind: type[int] | type[float] = int,
) -> flags.FlagHolder:
  """Defines a flag whose value is a list of `kind`; else absl refuses it.

  Args:
    name: name of the flag.
    default: its default.
    help: a line.
    kind: int or float, as Python reads them ("1_000", "1e-3").
  """
  serializer = flags.CsvListSerializer(",")
  return flags.DEFINE(
    _Numbers(kind), name, list(default), help, serializer=serializer
  )
