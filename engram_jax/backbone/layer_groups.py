"""Layer groups: a model's blocks, cut at its Engram layers.

The blocks of a group are alike and follow each other, so that their parameters
are a slice of one stack. What lies below the first Engram layer needs no rows:
these are the lower blocks, the others the upper ones.
"""

import itertools
from typing import NamedTuple

from engram_jax.config import ModelConfig


class LayerGroup(NamedTuple):
  """Blocks that follow each other with no Engram layer between them.

  Attributes:
    kind: name of the stack that they are in.
    start: index of the first one in the stack.
    stop: index after the last one.
    engram: number of the Engram layer that comes before them, or None.
  """

  kind: str
  start: int
  stop: int
  engram: int | None


def num_dense_blocks(config: ModelConfig) -> int:
  """Number of blocks without experts, which are the first ones."""
  return config.num_dense_layers if config.moe else config.num_layers


def num_lower_blocks(config: ModelConfig) -> int:
  """Number of blocks below the first Engram layer; all without a memory."""
  return (
    config.num_layers if config.engram is None else min(config.engram.layers)
  )


def layer_groups(config: ModelConfig) -> list[LayerGroup]:
  """The model's blocks from bottom to top."""
  layers = () if config.engram is None else config.engram.layers
  dense = num_dense_blocks(config)
  cuts = sorted({0, dense, config.num_layers, *layers})
  found = []
  for start, stop in itertools.pairwise(cuts):
    in_moe = start >= dense
    kind, offset = ("moe_blocks", dense) if in_moe else ("dense_blocks", 0)
    engram = layers.index(start) if start in layers else None
    found.append(LayerGroup(kind, start - offset, stop - offset, engram))
  return found
