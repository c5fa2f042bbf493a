"""Variable tracking, after RULER (arXiv 2404.06654): where has a value gone?

A text of random words has assignments in it, `copy SOURCE > TARGET .`: a value
into a variable, that variable into the next, and so on, in the text's order,
and several such chains at a time. The question names a value, `trace VALUE`,
and the answer all variables that have it: ` > VARIABLE > VARIABLE`. Variables
and values are drawn anew for every text.

Small models learn this only from texts of this form.
"""

import dataclasses
import itertools
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
from engram_jax.errors import require_integer, require_seed

_COPY = re.compile(r"copy (\w+) > (\w+) \.")
_TRACE = re.compile(r"\ntrace (\w+)$")


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
  """Chains of assignments.

  Attributes:
    chains: chains of a text, of which one is asked for.
    hops: variables of a chain.
    variables: number of words that may be a variable.
    values: number of words that may be a value.
    fillers: number of words that the haystack is made of.
    seed: seed of the words and of every draw. Configs that differ in chains and
      hops alone have the same words.
  """

  chains: int = 2
  hops: int = 2
  variables: int = 64
  values: int = 64
  fillers: int = 128
  seed: int = 0

  def __post_init__(self):
    require_integer("chains", self.chains, low=1)
    require_integer("hops", self.hops, low=1)
    # All variables and values of a text are distinct.
    require_integer("variables", self.variables, low=self.chains * self.hops)
    require_integer("values", self.values, low=self.chains)
    require_integer("fillers", self.fillers, low=1)
    require_seed("seed", self.seed)


def documents(
  config: TrackingConfig,
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
    asked: questions about one text, one after the other, each about another
      chain. More of them teach the form in fewer tokens.
    first: number of the first text; all numbers of a split have other texts.
  """
  require_integer("asked", asked, low=1, high=config.chains + 1)
  return write_documents(
    _task(config, asked), words=words, count=count, split=split, first=first
  )


def questions(
  config: TrackingConfig, *, words: int, depth: float | None, count: int
) -> Iterator[Question]:
  """Questions about texts that are in no document.

  Args:
    config: the task.
    words: length of the haystack, in words.
    depth: place of the first assignment of the chain asked for, from 0 to 1;
      the others follow it, the other chains lie anywhere. None draws it.
    count: number of questions.

  Returns:
    An iterator of questions with the labels `chains`, `hops`, `words` and
    `depth` (-1 for None).
  """
  # Distinct variables: a guesser knows that much.
  return write_questions(
    _task(config, 1),
    words=words,
    depth=depth,
    count=count,
    options=range(config.variables, config.variables - config.hops, -1),
    labels={"chains": config.chains, "hops": config.hops},
  )


def oracle(prompt: str) -> str:
  """The answer, from the prompt alone."""
  targets = dict(_COPY.findall(prompt))
  found, at = "", _TRACE.search(prompt)[1]
  while at in targets:
    at = targets[at]
    found += f" > {at}"
  return found


def _task(config: TrackingConfig, asked: int) -> Task:
  def draw(rng, words, depth):
    text, chains = _draw(config, rng, words=words, depth=depth)
    return Haystack(text, [_ask(chain) for chain in chains[:asked]])

  size = (config.chains, config.hops)
  variant = f"{config.chains}x{config.hops}"
  return Task("tracking", variant, config.seed, size, draw)


def _draw(
  config: TrackingConfig,
  rng: np.random.Generator,
  *,
  words: int,
  depth: float | None,
) -> tuple[str, list[list[str]]]:
  """The haystack and its chains, value first; the one asked for comes first."""
  variables, values, fillers = _vocabulary(config)
  shape = (config.chains, config.hops)
  chosen = rng.choice(len(variables), size=shape, replace=False)
  starts = rng.choice(len(values), size=config.chains, replace=False)
  chains, statements, depths = [], [], []
  for number, start in enumerate(starts):
    chain = [values[start], *(variables[i] for i in chosen[number])]
    pairs = itertools.pairwise(chain)
    statements += [f"copy {source} > {target} ." for source, target in pairs]
    first = depth if number == 0 else None
    depths += draw_depths(rng, config.hops, first, after=True)
    chains.append(chain)
  text = write_haystack(
    rng, fillers, words=words, statements=statements, depths=depths
  )
  return text, chains


def _ask(chain: list[str]) -> tuple[str, str]:
  """The query and its answer."""
  value, *variables = chain
  return f"trace {value}", "".join(f" > {name}" for name in variables)


def _vocabulary(config: TrackingConfig) -> tuple[tuple[str, ...], ...]:
  counts = (config.variables, config.values, config.fillers)
  return invent_vocabularies(config.seed, counts, taken=("copy", "trace"))
