"""Where a model is cut: into spans of blocks, at its Engram layers.

The blocks of a span are alike and follow each other, so that their parameters
are a slice of one stack. What lies below the first Engram layer needs no rows.
"""

import itertools
from typing import NamedTuple

from engram_jax.config import ModelConfig


class Span(NamedTuple):
  """Blocks that follow each other with no Engram layer between them.

  Attributes:
    kind: name of the stack that they are in.
    start: of the first, in the stack.
    stop: one past the last.
    engram: number of the Engram layer that comes before them, or None.
  """

  kind: str
  start: int
  stop: int
  engram: int | None


def num_dense_blocks(config: ModelConfig) -> int:
  """Blocks without experts: the first ones."""
  return config.num_dense_layers if config.moe else config.num_layers


def spans(config: ModelConfig) -> list[Span]:
  """The model from bottom to top."""
  layers = () if config.engram is None else config.engram.layers
  dense = num_dense_blocks(config)
  cuts = sorted({0, dense, config.num_layers, *layers})
  found = []
  for start, stop in itertools.pairwise(cuts):
    in_moe = start >= dense
    kind, offset = ("moe_blocks", dense) if in_moe else ("dense_blocks", 0)
    engram = layers.index(start) if start in layers else None
    found.append(Span(kind, start - offset, stop - offset, engram))
  return found


def below_memory(config: ModelConfig) -> list[Span]:
  """Those of `spans` that come before the first Engram layer."""
  found = spans(config)
  return list(itertools.takewhile(lambda span: span.engram is None, found))
