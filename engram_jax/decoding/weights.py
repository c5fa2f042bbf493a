"""Weights as decoding reads them: each block's apart, in the compute dtype.

Training keeps float32 weights, those of equal blocks in one array. A step of
decoding reads all of them for a few tokens, so that to slice or to cast them
would take longer than what they are read for. Both are done once, here.
"""

import dataclasses
import operator

import jax
from flax import nnx

from engram_jax.backbone.transformer import Block, Transformer
from engram_jax.config import ModelConfig
from engram_jax.parameters import map_parameters

STACKS = ("dense_blocks", "moe_blocks")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodingModel:
  """A transformer with arrays of its own for decoding; a pytree.

  Attributes:
    outer: the model without its blocks: embedding, Engram layers, head.
    blocks: the blocks, from bottom to top.
  """

  outer: Transformer
  blocks: tuple[Block, ...]

  @property
  def config(self) -> ModelConfig:
    return self.outer.config


def for_decoding(model: Transformer | DecodingModel) -> DecodingModel:
  """The same model with arrays of its own for decoding.

  Whoever is short of memory gives the result to `generate` or a decoder and
  lets the model go: they make one where they are given a model as trained.

  Args:
    model: on one device; unchanged. Given a result of this function, the
      result is it.

  Returns:
    As many `Block`s as the model has in place of each stack; parameters that
    are used in the compute dtype are cast to it.
  """
  if isinstance(model, DecodingModel):
    return model
  graph, weights = nnx.split(model)
  outer = nnx.merge(graph, _cast(weights, dtype=model.config.dtype))
  blocks = []
  for kind in STACKS:
    stack = getattr(outer, kind)
    if stack is not None:
      graph, stacked = nnx.split(stack)
      blocks += [nnx.merge(graph, weights) for weights in _apart(stacked)]
      setattr(outer, kind, None)
  return DecodingModel(outer, tuple(blocks))


@jax.jit(static_argnames="dtype")
def _cast(weights, *, dtype):
  def cast(name, metadata, leaf):
    del name
    return leaf if metadata.float32 else leaf.astype(dtype)

  return map_parameters(cast, weights)


@jax.jit
def _apart(stack):
  count = len(jax.tree.leaves(stack)[0])
  items = [operator.itemgetter(i) for i in range(count)]
  return [jax.tree.map(item, stack) for item in items]
