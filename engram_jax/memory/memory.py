"""A memory as one value: config, token compression and hash."""

import dataclasses

import jax

from engram_jax.config import EngramConfig
from engram_jax.memory.compression import TokenCompression
from engram_jax.memory.hashing import NgramHash


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Memory:
  """Config, token compression and hash of a model's memory; frozen.

  Attributes:
    config: sizes of the memory and its fusion.
    compression: the map from token ids to canonical ids.
    hashing: multipliers and primes of every Engram layer.
  """

  config: EngramConfig
  compression: TokenCompression
  hashing: NgramHash

  @property
  def vocab_size(self) -> int:
    """V, number of token ids."""
    return self.compression.vocab_size
