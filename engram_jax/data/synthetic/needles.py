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
import functools
import re
from collections.abc import Iterator

import numpy as np

from engram_jax.data.sources import Document
from engram_jax.data.synthetic.haystacks import (
  draw_depths,
  stream,
  write_haystack,
)
from engram_jax.data.synthetic.questions import Question
from engram_jax.data.synthetic.words import invent_words
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
    split: of which split they are; the two have other texts.
    asked: questions about one text, one after the other, each beginning with
      another key; of kinds with one key there is one. More of them teach the
      form in fewer tokens.
    first: number of the first text; all numbers of a split have other texts.
  """
  low, high = words
  require(0 <= low <= high, "words", words, "0 <= shortest <= longest")
  require_integer("asked", asked, low=1, high=config.needles + 1)
  for i in range(first, first + count):
    rng = stream(config.seed, split, KINDS.index(config.kind), i)
    length = int(rng.integers(low, high + 1))
    text, needles = _draw(config, rng, words=length, depth=None)
    one_key = config.kind in ("single", "multi_value")
    for turn in range(1 if one_key else asked):
      query, answer = _ask(config, needles[turn:] + needles[:turn])
      text += f"\n{query}{answer} ."
    yield Document(f"needles/{config.kind}-{split}{i:06}", split, f"{text}\n")


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

  Yields:
    Questions with the labels `kind`, `words` and `depth` (-1 for None).
  """
  require_integer("words", words, low=0)
  for i in range(count):
    kind = KINDS.index(config.kind)
    # The same texts at every depth, but for where the needles lie.
    rng = stream(config.seed, "questions", kind, words, i)
    text, needles = _draw(config, rng, words=words, depth=depth)
    query, answer = _ask(config, needles)
    # Distinct values: a guesser knows that much.
    left = config.values - np.arange(len(_asked(config, needles)))
    chance = float(1 / np.prod(left, dtype=float))
    labels = {"kind": config.kind, "words": words}
    labels["depth"] = -1.0 if depth is None else float(depth)
    yield Question(f"{text}\n{query}", answer, "needles", chance, labels)


def oracle(prompt: str) -> str:
  """The answer, from the prompt alone."""
  needles = _NEEDLE.findall(prompt)
  keys = _RECALL.search(prompt)[1].split()
  if len(keys) == 1:
    return "".join(f" {value}" for key, value in needles if key == keys[0])
  values = dict(needles)
  return "".join(f" {key} {values[key]}" for key in keys)


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


def _asked(
  config: NeedlesConfig, needles: list[tuple[str, str]]
) -> list[tuple[str, str]]:
  """The needles of a question, of those whose turn it is."""
  several = {"multi_value": config.needles, "multi_query": config.asked}
  return needles[: several.get(config.kind, 1)]


def _ask(
  config: NeedlesConfig, needles: list[tuple[str, str]]
) -> tuple[str, str]:
  """The query and its answer."""
  pairs = _asked(config, needles)
  if config.kind == "multi_query" and len(pairs) > 1:
    keys = " ".join(key for key, _ in pairs)
    return f"recall {keys} :", "".join(f" {k} {v}" for k, v in pairs)
  return f"recall {pairs[0][0]} :", "".join(f" {v}" for _, v in pairs)


@functools.lru_cache
def _vocabulary(config: NeedlesConfig) -> tuple[tuple[str, ...], ...]:
  rng = np.random.default_rng([config.seed, 0])
  taken = {"note", "recall"}
  counts = (config.keys, config.values, config.fillers)
  return tuple(invent_words(rng, count, taken=taken) for count in counts)
