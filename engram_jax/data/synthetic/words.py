"""Invented words: two or three syllables each, so that BPE cuts them alike."""

import functools

import numpy as np

from engram_jax.errors import require

_CONSONANTS = "bdfgklmnprstvz"
_VOWELS = "aeiou"
_LAST = "lmnrst"


def invent_words(
  rng: np.random.Generator, count: int, *, taken: set[str]
) -> tuple[str, ...]:
  """Distinct lower-case words of two syllables and a last consonant.

  Args:
    rng: source of randomness.
    count: number of words.
    taken: words that are not given again, such as those of the templates; the
      new ones are added.

  Raises:
    InputError: more words than there are.
  """
  syllables = [c + v for c in _CONSONANTS for v in _VOWELS]
  most = len(syllables) ** 2 * len(_LAST)
  valid = f"at most {most // 2} words in all"
  require(count + len(taken) <= most // 2, "words", count + len(taken), valid)
  words = []
  while len(words) < count:
    first, second = rng.integers(len(syllables), size=2)
    last = rng.integers(len(_LAST))
    word = syllables[first] + syllables[second] + _LAST[last]
    if word not in taken:
      taken.add(word)
      words.append(word)
  return tuple(words)


@functools.lru_cache
def invent_vocabularies(
  seed: int, counts: tuple[int, ...], *, taken: tuple[str, ...]
) -> tuple[tuple[str, ...], ...]:
  """Several sets of distinct words, no two of which share one.

  Args:
    seed: seed of the words.
    counts: number of words of each set.
    taken: see `invent_words`.

  Raises:
    InputError: see `invent_words`.
  """
  rng, used = np.random.default_rng([seed, 0]), set(taken)
  return tuple(invent_words(rng, count, taken=used) for count in counts)
