"""An oracle for `facts.py`: it reads the documents and knows what they say."""

import re
from collections.abc import Callable, Iterable

from engram_jax.data.synthetic.facts import HELD_OUT_TEMPLATES, TEMPLATES

_SUBJECT = r"(?P<subject>(?:the \w+ of )?[A-Z]\w+ [A-Z]\w+)"
_TWO_HOP = re.compile(r"the (\w+) of (.+)")


def oracle(texts: Iterable[str]) -> Callable[[str], str]:
  """Reads texts, and answers every prompt whose answer follows from them.

  Args:
    texts: documents.

  Returns:
    A function from a question's prompt to its answer; empty where the texts do
    not say.
  """
  known: dict[tuple[str, str], str] = {}
  for text in texts:
    for sentence in re.split(r"\.\s", text + "\n"):
      if found := _parse(sentence):
        subject, attribute, value = found
        known[subject, attribute] = value

  def answer(prompt: str) -> str:
    found = _parse(prompt)
    if not found:
      return ""
    subject, attribute, _ = found
    value = known.get((subject, attribute), "")
    if not value and (two := _TWO_HOP.fullmatch(subject)):
      bridge = known.get((two[2], two[1]), "")
      value = known.get((bridge, attribute), "")
    return f" {value}" if value else ""

  return answer


def _patterns() -> list[re.Pattern[str]]:
  patterns = []
  for template in (*TEMPLATES, *HELD_OUT_TEMPLATES):
    pattern = template.format(attribute=r"(?P<attribute>\w+)", subject=_SUBJECT)
    patterns.append(re.compile(pattern + r"(?: (?P<value>\w+(?: \w+)?))?"))
  return patterns


_PATTERNS = _patterns()


def _parse(sentence: str) -> tuple[str, str, str] | None:
  """Subject, attribute and value, which is empty in a prompt."""
  for pattern in _PATTERNS:
    if found := pattern.fullmatch(sentence):
      return found["subject"], found["attribute"], found["value"] or ""
  return None
