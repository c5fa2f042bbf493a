"""Statements at chosen places of a text of random words."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from engram_jax.data.sources import Document
from engram_jax.data.synthetic.questions import Label, Question
from engram_jax.errors import require, require_integer

#: Independent draws: documents of either split, and questions.
STREAMS = ("train", "validation", "questions")


def stream(seed: int, name: str, *numbers: int) -> np.random.Generator:
  """Randomness of its own for each stream and each of its items.

  Args:
    seed: the config's.
    name: one of `STREAMS`.
    *numbers: which item.
  """
  require(name in STREAMS, "split", name, f"one of {', '.join(STREAMS)}")
  return np.random.default_rng([seed, 1 + STREAMS.index(name), *numbers])


class Haystack(NamedTuple):
  """A text, and the questions that it answers.

  Attributes:
    text: the words with the statements among them.
    turns: query and answer of each question, the first one first.
  """

  text: str
  turns: list[tuple[str, str]]


#: From randomness, number of words and depth of what is asked for first.
Draw = Callable[[np.random.Generator, int, float | None], Haystack]


class Task(NamedTuple):
  """What the tasks in haystacks have in common.

  Attributes:
    name: name of the task.
    variant: name of the kind of its texts.
    seed: the config's.
    numbers: what else the draws of the task depend on.
    draw: makes a haystack.
  """

  name: str
  variant: str
  seed: int
  numbers: tuple[int, ...]
  draw: Draw


def write_documents(
  task: Task, *, words: tuple[int, int], count: int, split: str, first: int
) -> Iterator[Document]:
  """Texts with their questions and answers; every place is equally likely.

  Args:
    task: the task.
    words: shortest and longest haystack, in words.
    count: number of texts.
    split: `train` or `validation`, which have other texts.
    first: number of the first text; all numbers of a split have other texts.
  """
  low, high = words
  require(0 <= low <= high, "words", words, "0 <= shortest <= longest")
  for i in range(first, first + count):
    rng = stream(task.seed, split, *task.numbers, i)
    text, turns = task.draw(rng, int(rng.integers(low, high + 1)), None)
    said = "".join(f"\n{query}{answer} ." for query, answer in turns)
    name = f"{task.name}/{task.variant}-{split}{i:06}"
    yield Document(name, split, f"{text}{said}\n")


def write_questions(
  task: Task,
  *,
  words: int,
  depth: float | None,
  count: int,
  options: Sequence[int],
  labels: Mapping[str, Label],
) -> Iterator[Question]:
  """Questions about texts that are in no document: the first turn of each.

  Args:
    task: the task.
    words: length of the haystack, in words.
    depth: place of what is asked for, from 0 to 1; None draws it.
    count: number of questions.
    options: at each word of the answer the number of those left to guess from.
    labels: labels besides `words` and `depth` (-1 for None).
  """
  require_integer("words", words, low=0)
  chance = float(1 / np.prod(options, dtype=float))
  at = -1.0 if depth is None else float(depth)
  for i in range(count):
    # The same texts at every depth, but for where the statements lie.
    rng = stream(task.seed, "questions", *task.numbers, words, i)
    text, [(query, answer), *_] = task.draw(rng, words, depth)
    found = {**labels, "words": words, "depth": at}
    yield Question(f"{text}\n{query}", answer, task.name, chance, found)


def draw_depths(
  rng: np.random.Generator, count: int, depth: float | None, *, after: bool
) -> list[float]:
  """Places of statements in a text, from 0, its beginning, to 1, its end.

  Args:
    rng: source of randomness.
    count: number of statements.
    depth: place of the first of them; None draws it as the others.
    after: the others follow it, in their order; else they lie anywhere.
  """
  valid = "0 to 1, or None"
  require(depth is None or 0 <= depth <= 1, "depth", depth, valid)
  depths = rng.random(count)
  others = depths[1:].copy()
  if after:
    depths.sort()
  if depth is not None:
    depths[0] = depth
    if after:
      depths[1:] = np.sort(depth + (1 - depth) * others)
  return depths.tolist()


def write_haystack(
  rng: np.random.Generator,
  fillers: Sequence[str],
  *,
  words: int,
  statements: Sequence[str],
  depths: Sequence[float],
) -> str:
  """Random words with the statements among them.

  Args:
    rng: source of randomness.
    fillers: words, all equally likely.
    words: length without the statements.
    statements: sentences; those at one place keep their order.
    depths: for each statement the share of the words that come before it.
  """
  parts = [str(word) for word in rng.choice(np.array(fillers), size=words)]
  places = [round(depth * words) for depth in depths]
  # From the last: the places before it stay what they are.
  for i in sorted(range(len(places)), key=places.__getitem__)[::-1]:
    parts.insert(places[i], statements[i])
  return " ".join(parts)
