"""What each token of a Python source is: name, keyword, operator, prose ...

A token is a piece of text that knows nothing of syntax. The joined text of a
document is scanned as Python does, and a token is of the class in which its
last character that is no space stands. A source that is cut off or wrong is
scanned as far as it makes sense; nothing is refused.
"""

import keyword
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Shaped

#: "prose": comments and strings in three quotes, which are mostly docstrings.
#: "space": spaces and newlines outside of these. "other": tokens without text,
#: such as an end of document or the first bytes of a character.
CLASSES = (
  "keyword",
  "name",
  "number",
  "operator",
  "string",
  "prose",
  "space",
  "other",
)

_SCANNER = re.compile(
  r"""
  (?P<prose> \#[^\n]* | \"{3}(?:\\.|[^\\])*?(?:\"{3}|\Z)
           | '{3}(?:\\.|[^\\])*?(?:'{3}|\Z) )
  | (?P<string> "(?:\\.|[^"\\\n])*"? | '(?:\\.|[^'\\\n])*'? )
  | (?P<number> \d[\w.]* | \.\d[\w.]* )
  | (?P<name> \w+ )
  | (?P<space> \s+ )
  | (?P<operator> . )
  """,
  re.VERBOSE | re.DOTALL,
)


def token_classes(texts: Sequence[str]) -> Shaped[np.ndarray, "n"]:
  """The class of each token of one document.

  Args:
    texts: n pieces of text that join to the document, from its first token on;
      see `gates.token_texts`.

  Returns:
    [n] of `CLASSES`, as NumPy strings.
  """
  whole = "".join(texts)
  by_character = np.empty(len(whole), np.int8)
  for match in _SCANNER.finditer(whole):
    kind = match.lastgroup
    if kind == "name" and keyword.iskeyword(match.group()):
      kind = "keyword"
    by_character[match.start() : match.end()] = CLASSES.index(kind)
  found, start = [], 0
  for text in texts:
    last = start + len(text.rstrip()) - 1
    # Of a token of spaces alone the last of them; in a string it is the
    # string's.
    last = last if last >= start else start + len(text) - 1
    found.append(CLASSES[by_character[last]] if text else "other")
    start += len(text)
  return np.array(found, dtype="<U8")


def word_ends(texts: Sequence[str]) -> Bool[np.ndarray, "n"]:
  """Whether each token is the last of a word of two or more.

  A stand-in for the last tokens of entities, at which the paper compares
  representations: here the word is known as a whole for the first time.

  Args:
    texts: n pieces of text that join to a document.
  """
  begins_in_word = np.array([bool(re.match(r"\w", x)) for x in texts], bool)
  ends_in_word = np.array([bool(re.search(r"\w\Z", x)) for x in texts], bool)
  # Whether a word goes on from each token to the next.
  goes_on = ends_in_word & np.append(begins_in_word[1:], False)
  return np.append(False, goes_on[:-1])[: len(texts)] & ~goes_on
