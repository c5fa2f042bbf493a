"""Keeps the line breaks of indented docstring blocks in the API reference.

Docstrings set equations, tables and axis legends two columns in and rely on
their line breaks. Markdown would join the lines into one paragraph, so this
extension of Griffe, which reads the docstrings, fences such blocks.
"""

import re
from typing import Any

import griffe

SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):$", re.M)
#: Indented lines, and the blank lines between them.
BLOCK = re.compile(r"(?:^  .*\n)(?:(?:[ \t]*\n)*^  .*\n)*", re.M)
LIST_ITEM = re.compile(r"[-*] ")


def fence_blocks(text: str) -> str:
  """The docstring with its indented blocks written as Markdown.

  Args:
    text: docstring without the indentation that all of its lines share.

  Returns:
    The same text with indented lists moved to the margin and other indented
    blocks fenced. Sections such as `Args:` are left alone.
  """
  section = SECTION.search(text)
  end = section.start() if section else len(text)
  prose = BLOCK.sub(_as_markdown, text[:end].rstrip() + "\n")
  return prose + ("\n" if section else "") + text[end:]


def _as_markdown(match: re.Match) -> str:
  block = re.sub(r"^  ", "", match.group(), flags=re.M)
  if LIST_ITEM.match(block):
    return f"\n{block}"
  return f"\n```text\n{block}```\n"


class DocstringBlocks(griffe.Extension):
  """Applies `fence_blocks` to every docstring."""

  def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
    """Rewrites the docstring of one object before it is parsed.

    Args:
      obj: the object, complete with its members.
      **kwargs: what else Griffe passes on; not used.
    """
    if obj.docstring is not None:
      obj.docstring.value = fence_blocks(obj.docstring.value)
