"""Tokens laid out like text in an editor: which lines and columns each covers.

Every character takes one column of a monospaced page, but for a tab, which
reaches to the next tab stop. A newline ends its line and is shown there in one
column of its own, since it belongs to a token too. A line longer than the page
is continued on the next one.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from engram_jax.errors import require

#: Stands where a newline is.
NEWLINE_MARK = "\u21b5"


class Box(NamedTuple):
  """The part of one token that stands on one line.

  Attributes:
    token: its index.
    line: line of the page, from 0.
    column: column of the first character, from 0.
    text: what stands there, one character per column.
  """

  token: int
  line: int
  column: int
  text: str


class TextLayout(NamedTuple):
  """A page.

  Attributes:
    boxes: in the order of the text. A token of several lines has several; an
      empty one has none.
    numbers: the source's line number, from 1, of each line of the page; None
      for a continuation.
    columns: width of the widest line.
  """

  boxes: tuple[Box, ...]
  numbers: tuple[int | None, ...]
  columns: int


def layout_tokens(
  tokens: Sequence[str], *, max_columns: int = 88, tab_size: int = 4
) -> TextLayout:
  """Lays out the text that `tokens` spell when joined.

  Args:
    tokens: pieces of text, newlines and tabs included.
    max_columns: width of the page; the mark of a newline may hang over.
    tab_size: columns between tab stops.

  Raises:
    InputError: a page narrower than a tab.
  """
  require(tab_size >= 1, "tab_size", tab_size, "an integer >= 1")
  valid = f"at least tab_size = {tab_size}"
  require(max_columns >= tab_size, "max_columns", max_columns, valid)
  numbers: list[int | None] = []
  cells = list(_cells(tokens, max_columns, tab_size, numbers))
  boxes = []
  for _, group in itertools.groupby(cells, key=lambda cell: cell[:2]):
    first, *rest = group
    text = first.text + "".join(cell.text for cell in rest)
    boxes.append(first._replace(text=text))
  columns = max((box.column + len(box.text) for box in boxes), default=0)
  return TextLayout(tuple(boxes), tuple(numbers), columns)


def _cells(
  tokens: Sequence[str],
  max_columns: int,
  tab_size: int,
  numbers: list[int | None],
) -> Iterator[Box]:
  """One box per character; fills `numbers` line by line."""
  column, source_line, at_start = 0, 1, True
  for index, token in enumerate(tokens):
    for character in token:
      text = character
      if character == "\n":
        text = NEWLINE_MARK
      elif character == "\t":
        text = " " * (tab_size - column % tab_size)
      if at_start:
        numbers.append(source_line)
        column = 0
      elif character != "\n" and column + len(text) > max_columns:
        numbers.append(None)
        column = 0
        text = " " * tab_size if character == "\t" else text
      yield Box(index, len(numbers) - 1, column, text)
      column += len(text)
      at_start = character == "\n"
      if at_start:
        source_line, column = source_line + 1, 0
