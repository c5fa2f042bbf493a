"""Statements at chosen places of a text of random words."""

from collections.abc import Sequence

import numpy as np

from engram_jax.errors import require

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
