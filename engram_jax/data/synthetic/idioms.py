"""Idioms in noise: a text whose entropy is known to the last digit.

The text is a sequence of words. At a free place an idiom begins with
probability `rate`, and otherwise stands a noise word, drawn from a Zipf
distribution. All idioms are equally likely. An idiom is `length` words: an
opener, which stands nowhere else and begins several idioms; a second word,
which says which one; and the rest, which follow from the two. All but the
opener are noise words as well, so that only the n-gram tells an idiom from
noise. Who reads from the beginning always knows where an idiom begins and ends:

  nats per free place = H(rate) + (1 - rate) H(noise) + rate log(idioms)
  words per free place = 1 - rate + rate length

and the entropy of a word is the one over the other. A tokenizer only renames
texts: the floor of a model's loss is the texts' nats over their tokens.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from jaxtyping import Float

from engram_jax.data.sources import Document
from engram_jax.data.synthetic.haystacks import stream
from engram_jax.data.synthetic.questions import Question
from engram_jax.data.synthetic.words import invent_words
from engram_jax.errors import InputError, require, require_integer, require_seed


@dataclasses.dataclass(frozen=True)
class IdiomsConfig:
  """A source of text with idioms.

  Attributes:
    rate: probability that an idiom begins at a free place, between 0 and 1.
    idioms: number of idioms, a multiple of `openers`.
    openers: number of words that begin an idiom.
    length: words of an idiom, at least 3.
    noise_words: number of noise words.
    exponent: the r-th noise word has a weight of 1 / r ** exponent.
    words: words of a document; its end may cut an idiom.
    seed: seed of the words, the idioms and every draw.
  """

  rate: float = 0.1
  idioms: int = 64
  openers: int = 8
  length: int = 5
  noise_words: int = 256
  exponent: float = 1.0
  words: int = 128
  seed: int = 0

  def __post_init__(self):
    require(0 < self.rate < 1, "rate", self.rate, "between 0 and 1")
    require_integer("openers", self.openers, low=1)
    require_integer("idioms", self.idioms, low=1)
    valid = f"a multiple of openers = {self.openers}"
    require(self.idioms % self.openers == 0, "idioms", self.idioms, valid)
    require_integer("length", self.length, low=3)
    low = self.idioms // self.openers
    require_integer("noise_words", self.noise_words, low=low)
    ok = math.isfinite(self.exponent) and self.exponent >= 0
    require(ok, "exponent", self.exponent, ">= 0")
    require_integer("words", self.words, low=1)
    require_seed("seed", self.seed)


def make_idioms(config: IdiomsConfig) -> tuple[tuple[str, ...], ...]:
  """The idioms, `length` words each; their first two words are all distinct."""
  rng = np.random.default_rng([config.seed, 0])
  noise, openers = _vocabulary(config)
  per_opener = config.idioms // config.openers
  seconds = rng.choice(len(noise), size=per_opener, replace=False)
  rest = (config.idioms, config.length - 2)
  bodies = rng.integers(len(noise), size=rest)
  return tuple(
    (
      openers[i // per_opener],
      noise[seconds[i % per_opener]],
      *(noise[j] for j in body),
    )
    for i, body in enumerate(bodies)
  )


def noise_probabilities(config: IdiomsConfig) -> Float[np.ndarray, "words"]:
  """Probability of each noise word at a free place without an idiom."""
  weights = np.arange(1, config.noise_words + 1) ** -float(config.exponent)
  return weights / weights.sum()


def entropy_per_word(config: IdiomsConfig) -> float:
  """The floor of any model's loss on long texts, in nats per word."""
  choice, noise = _entropies(config)
  idiom = math.log(config.idioms)
  rate = config.rate
  nats = choice + (1 - rate) * noise + rate * idiom
  return nats / (1 - rate + rate * config.length)


def expected_nats(config: IdiomsConfig, *, words: int) -> float:
  """The entropy of a document's first words: the mean of `nats`, exactly.

  Args:
    config: the source.
    words: number of words; the document begins at a free place.
  """
  choice, noise = _entropies(config)
  rate, openers = config.rate, math.log(config.openers)
  idiom = math.log(config.idioms)
  ahead = [0.0]  # of so many words
  for left in range(1, words + 1):
    after = ahead[max(left - config.length, 0)]
    begun = (idiom if left > 1 else openers) + after
    ahead.append(choice + (1 - rate) * (noise + ahead[-1]) + rate * begun)
  return ahead[words]


def nats(config: IdiomsConfig, text: str) -> float:
  """-log P(text), in nats: what a reader pays who knows all of the config.

  Over the number of the text's tokens it is the floor of the loss on this very
  text: the ends of documents, which no token predicts, are not counted.

  Args:
    config: the source.
    text: one document, from its beginning; it may end anywhere.

  Raises:
    InputError: a text that this source cannot give.
  """
  noise, openers = _vocabulary(config)
  costs = dict(zip(noise, -np.log(noise_probabilities(config))))
  idioms = {idiom[:2]: idiom for idiom in make_idioms(config)}
  words, total, at = text.split(), 0.0, 0
  while at < len(words):
    if words[at] in costs:
      total += costs[words[at]] - math.log(1 - config.rate)
      at += 1
      continue
    require(words[at] in openers, "text", words[at], "a word of the source")
    total += math.log(config.openers) - math.log(config.rate)
    if at + 1 < len(words):
      pair = (words[at], words[at + 1])
      total += math.log(config.idioms / config.openers)
      found = tuple(words[at : at + config.length])
      if idioms.get(pair, ())[: len(found)] != found:
        raise InputError("text", " ".join(found), "an idiom of the source")
    at += config.length
  return float(total)


def documents(
  config: IdiomsConfig, *, count: int, split: str = "train"
) -> Iterator[Document]:
  """Texts of `words` words.

  Args:
    config: the source.
    count: number of texts.
    split: `train` or `validation`, which have other texts.
  """
  idioms = make_idioms(config)
  for i in range(count):
    rng = stream(config.seed, split, i)
    words = _draw(config, rng, idioms, config.words)[: config.words]
    name = f"idioms/{split}{i:06}"
    yield Document(name, split, f"{' '.join(words)}\n")


def questions(
  config: IdiomsConfig, *, context: int, count: int
) -> Iterator[Question]:
  """How an idiom goes on after its first two words.

  Args:
    config: the source.
    context: words before the idiom, at least.
    count: number of questions; all idioms take turns.

  Yields:
    Questions with the label `idiom`, its number.
  """
  require_integer("context", context, low=0)
  idioms = make_idioms(config)
  for i in range(count):
    rng = stream(config.seed, "questions", i)
    idiom = idioms[i % len(idioms)]
    words = [*_draw(config, rng, idioms, context), *idiom[:2]]
    answer = " " + " ".join(idiom[2:])
    labels = {"idiom": i % len(idioms)}
    yield Question(" ".join(words), answer, "idioms", 1 / len(idioms), labels)


def oracle(texts: Iterable[str], *, length: int) -> Callable[[str], str]:
  """Reads texts, and continues a prompt as its last two words have before.

  Args:
    texts: documents.
    length: words of an idiom.

  Returns:
    A function from a question's prompt to its answer; empty where the texts do
    not have the two words.
  """
  known: dict[tuple[str, ...], str] = {}
  for text in texts:
    words = text.split()
    for at in range(len(words) - length + 1):
      after = " ".join(words[at + 2 : at + length])
      known[tuple(words[at : at + 2])] = f" {after}"
  return lambda prompt: known.get(tuple(prompt.split()[-2:]), "")


def _draw(
  config: IdiomsConfig,
  rng: np.random.Generator,
  idioms: tuple[tuple[str, ...], ...],
  least: int,
) -> list[str]:
  """Words up to the first free place from `least` on."""
  noise, _ = _vocabulary(config)
  cumulative = np.cumsum(noise_probabilities(config))
  words: list[str] = []
  while len(words) < least:
    if rng.random() < config.rate:
      words += idioms[rng.integers(len(idioms))]
    else:
      at = np.searchsorted(cumulative, rng.random(), side="right")
      words.append(noise[min(at, len(noise) - 1)])
  return words


def _entropies(config: IdiomsConfig) -> tuple[float, float]:
  """Of whether an idiom begins, and of a noise word; in nats."""
  p, rate = noise_probabilities(config), config.rate
  choice = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
  return choice, -float(np.sum(p * np.log(p)))


@functools.lru_cache
def _vocabulary(
  config: IdiomsConfig,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """Noise words, the most frequent first, and openers."""
  rng = np.random.default_rng([config.seed, 4])
  taken: set[str] = set()
  noise = invent_words(rng, config.noise_words, taken=taken)
  return noise, invent_words(rng, config.openers, taken=taken)
