"""Weights as decoding reads them: each block's apart, in the compute dtype.

Training keeps float32 weights, those of equal blocks in one array. A step of
decoding reads all of them for a few tokens, so that to slice or to cast them
would take longer than what they are read for. Both are done once, here.
"""

import operator

import jax
from flax import nnx

from engram_jax.backbone.transformer import Transformer
from engram_jax.parameters import map_parameters


def for_decoding(model: Transformer) -> Transformer:
  """The same model with arrays of its own for decoding.

  Whoever is short of memory gives the result to `generate` or a decoder and
  lets the model go: they make one where they are given a model as trained.

  Args:
    model: on one device; unchanged. Given a result of this function, the
      result is it.

  Returns:
    A model with as many `Block`s as it has blocks in place of each stack, and
    with the parameters that are used in the compute dtype cast to it.
  """
  kinds = ("dense_blocks", "moe_blocks")
  stacks = {kind: getattr(model, kind) for kind in kinds}
  stacks = {kind: x for kind, x in stacks.items() if x is not None}
  if any(isinstance(x, nnx.List) for x in stacks.values()):
    return model
  graph, weights = nnx.split(model)
  found = nnx.merge(graph, _cast(weights, dtype=model.config.dtype))
  for kind in stacks:
    graph, stack = nnx.split(getattr(found, kind))
    apart = [nnx.merge(graph, weights) for weights in _apart(stack)]
    setattr(found, kind, nnx.List(apart))
  return found


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
