"""Needles in a haystack, after RULER (arXiv 2404.06654): what was said once.

A text of random words has needles in it, `note KEY : VALUE .`, and ends in a
question, `recall KEY :`. Keys and values are drawn anew for every text, so that
nothing but the text tells the answer.

  single       one needle
  multi_key    several, of which one is asked for
  multi_value  several with one key: all values, in the text's order
  multi_query  several, of which some are asked for, `recall KEY KEY`, and told
               with their keys: ` : KEY VALUE KEY VALUE`

Small models learn this only from texts of this form.
"""

import dataclasses
import re
from collections.abc import Iterator

import numpy as np

from engram_jax.data.sources import Document
from engram_jax.data.synthetic.haystacks import (
  Haystack,
  Task,
  draw_depths,
  write_documents,
  write_haystack,
  write_questions,
)
from engram_jax.data.synthetic.questions import Question
from engram_jax.data.synthetic.words import invent_vocabularies
from engram_jax.errors import require, require_integer, require_seed

KINDS = ("single", "multi_key", "multi_value", "multi_query")

_NEEDLE = re.compile(r"note (\w+) : (\w+) \.")
_RECALL = re.compile(r"\nrecall ([\w ]+) :$")


@dataclasses.dataclass(frozen=True)
class NeedlesConfig:
  """Needles of one kind.

  Attributes:
    kind: one of `KINDS`.
    needles: needles of a text; a single one has 1 whatever this says.
    asked: keys that multi_query asks for.
    keys: number of words that may be a key.
    values: number of words that may be a value.
    fillers: number of words that the haystack is made of.
    seed: seed of the words and of every draw. Configs that differ in the kind
      alone have the same words.
  """

  kind: str = "single"
  needles: int = 4
  asked: int = 2
  keys: int = 64
  values: int = 64
  fillers: int = 128
  seed: int = 0

  def __post_init__(self):
    require(self.kind in KINDS, "kind", self.kind, f"one of {', '.join(KINDS)}")
    require_integer("needles", self.needles, low=1)
    require_integer("asked", self.asked, low=1, high=self.needles + 1)
    # All needles of a text have distinct keys and values.
    require_integer("keys", self.keys, low=self.needles)
    require_integer("values", self.values, low=max(self.needles, 2))
    require_integer("fillers", self.fillers, low=1)
    require_seed("seed", self.seed)


def documents(
  config: NeedlesConfig,
  *,
  words: tuple[int, int],
  count: int,
  split: str = "train",
  asked: int = 1,
  first: int = 0,
) -> Iterator[Document]:
  """Texts with their question and its answer; every place is equally likely.

  Args:
    config: the task.
    words: shortest and longest haystack, in words.
    count: number of texts.
    split: `train` or `validation`, which have other texts.
    asked: questions about one text, one after the other, each beginning with
      another key; of kinds with one key there is one. More of them teach the
      form in fewer tokens.
    first: number of the first text; all numbers of a split have other texts.
  """
  require_integer("asked", asked, low=1, high=config.needles + 1)
  return write_documents(
    _task(config, asked), words=words, count=count, split=split, first=first
  )


def questions(
  config: NeedlesConfig, *, words: int, depth: float | None, count: int
) -> Iterator[Question]:
  """Questions about texts that are in no document.

  Args:
    config: the task.
    words: length of the haystack, in words.
    depth: place of the (first) needle asked for, from 0 to 1: the values of
      multi_value follow it, all other needles lie anywhere. None draws it.
    count: number of questions.

  Returns:
    An iterator of questions with the labels `kind`, `words` and `depth` (-1 for
    None).
  """
  # Distinct values: a guesser knows that much.
  several = _needles_asked(config)
  return write_questions(
    _task(config, 1),
    words=words,
    depth=depth,
    count=count,
    options=range(config.values, config.values - several, -1),
    labels={"kind": config.kind},
  )


def oracle(prompt: str) -> str:
  """The answer, from the prompt alone."""
  needles = _NEEDLE.findall(prompt)
  keys = _RECALL.search(prompt)[1].split()
  if len(keys) == 1:
    return "".join(f" {value}" for key, value in needles if key == keys[0])
  values = dict(needles)
  return "".join(f" {key} {values[key]}" for key in keys)


def _task(config: NeedlesConfig, asked: int) -> Task:
  def draw(rng, words, depth):
    text, needles = _draw(config, rng, words=words, depth=depth)
    turns = 1 if config.kind in ("single", "multi_value") else asked
    orders = (needles[turn:] + needles[:turn] for turn in range(turns))
    return Haystack(text, [_ask(config, order) for order in orders])

  numbers = (KINDS.index(config.kind),)
  return Task("needles", config.kind, config.seed, numbers, draw)


def _draw(
  config: NeedlesConfig,
  rng: np.random.Generator,
  *,
  words: int,
  depth: float | None,
) -> tuple[str, list[tuple[str, str]]]:
  """The haystack and its needles, key and value, those asked for first."""
  keys, values, fillers = _vocabulary(config)
  needles = 1 if config.kind == "single" else config.needles
  one_key = config.kind == "multi_value"
  chosen = rng.choice(len(keys), size=needles, replace=False)
  names = [keys[chosen[0] if one_key else i] for i in chosen]
  found = [values[i] for i in rng.choice(len(values), needles, replace=False)]
  depths = draw_depths(rng, needles, depth, after=one_key)
  pairs = list(zip(names, found))
  statements = [f"note {key} : {value} ." for key, value in pairs]
  text = write_haystack(
    rng, fillers, words=words, statements=statements, depths=depths
  )
  return text, pairs


def _needles_asked(config: NeedlesConfig) -> int:
  """Number of needles that one question asks for."""
  several = {"multi_value": config.needles, "multi_query": config.asked}
  return several.get(config.kind, 1)


def _ask(
  config: NeedlesConfig, needles: list[tuple[str, str]]
) -> tuple[str, str]:
  """The query and its answer."""
  pairs = needles[: _needles_asked(config)]
  if config.kind == "multi_query" and len(pairs) > 1:
    keys = " ".join(key for key, _ in pairs)
    return f"recall {keys} :", "".join(f" {k} {v}" for k, v in pairs)
  return f"recall {pairs[0][0]} :", "".join(f" {v}" for _, v in pairs)


def _vocabulary(config: NeedlesConfig) -> tuple[tuple[str, ...], ...]:
  counts = (config.keys, config.values, config.fillers)
  return invent_vocabularies(config.seed, counts, taken=("note", "recall"))
