"""The whole model: embedding, blocks, head. Rows come in, the table never does.

The embedding is repeated into G residual streams H [B, L, G, D]. Block l:

  H <- H + Engram_l(H, rows_l)         only at the Engram layers
  H <- H + Attention(RMSNorm(H))
  H <- H + FFN(RMSNorm(H))             SwiGLU in the leading blocks, then MoE

and logits = RMSNorm(sum of the streams) W^T. With G > 1 hyper-connections take
the place of both plain additions (`hyper_connections.py`).

The parameters of equal blocks are one array each, block by block along its
first axis: a loop over them is compiled once (`scan_blocks`), and the optimizer
has few arrays. Where the Engram layers sit changes no name and no shape; blocks
between them are a slice. Axes besides those of `types.py`:

  n  blocks of one kind

Here a pass goes over whole sequences. Decoding has a loop of its own over the
same blocks, with caches: `decoding/forward.py`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from engram_jax import sharding
from engram_jax.backbone.attention import LatentAttention, LatentCache
from engram_jax.backbone.hyper_connections import HyperConnections, read, write
from engram_jax.backbone.layer_groups import (
  LayerGroup,
  layer_groups,
  num_dense_blocks,
)
from engram_jax.backbone.layers import (
  VOCABULARY,
  Embedding,
  RMSNorm,
  SwiGLU,
  logits_of,
  normal_param,
)
from engram_jax.backbone.moe import MoE, MoEMetrics
from engram_jax.config import ModelConfig
from engram_jax.errors import require
from engram_jax.fusion.engram import Engram, Fusion
from engram_jax.fusion.over_encoding import OverEncoding
from engram_jax.memory.breaks import require_breaks
from engram_jax.types import Break, Breaks, Gates, Hidden, Rows, TokenIds

_FUSIONS = {"gated": Engram, "input_average": OverEncoding}


class Context(NamedTuple):
  """What every block is told of the tokens, besides their streams.

  Attributes:
    positions: int32 [B, L], of the tokens in their documents.
    segments: int32 [B, L], numbers of documents; None for one a sequence.
    dispatch: form of expert dispatch; None for the config's.
  """

  positions: Int[Array, "B L"]
  segments: Int[Array, "B L"] | None = None
  dispatch: str | None = None


class BlockOutput(NamedTuple):
  """What a block returns.

  Attributes:
    streams: [B, L, G, D].
    cache: the cache with these tokens; None if none was given.
    moe: statistics of its experts; None without.
  """

  streams: Hidden
  cache: LatentCache | None
  moe: MoEMetrics | None


class ModelOutput(NamedTuple):
  """What a forward pass returns.

  Attributes:
    logits: float32 [B, L, V]; None if not wanted.
    hidden: [B, L, D], what the head makes logits of.
    moe: statistics of the blocks with experts, stacked: [n, E] and [n]; None
      without.
    gates: float32 [B, L, G] per Engram layer; empty when the memory is off.
    observed: what `observe` returned, with an axis of all blocks in front; None
      if it was not given.
  """

  logits: Float[Array, "B L V"] | None
  hidden: Float[Array, "B L D"]
  moe: MoEMetrics | None
  gates: dict[int, Gates]
  observed: Any = None


def document_layout(
  breaks: Breaks,
) -> tuple[Int[Array, "B L"], Int[Array, "B L"]]:
  """Position within its document, and number of its document, per token.

  Args:
    breaks: [B, L] of `Break`; only document starts count here.

  Returns:
    int32 [B, L] positions from 0, and int32 [B, L] segments.

  Raises:
    InputError: a value that is no `Break` (outside jit).
  """
  require_breaks(breaks)
  starts = breaks == Break.DOCUMENT_START
  index = jnp.arange(breaks.shape[1])
  first = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
  return index - first, jnp.cumsum(starts, axis=1, dtype=jnp.int32)


class Block(nnx.Module):
  """Attention and FFN around the residual streams."""

  def __init__(self, config: ModelConfig, *, has_experts: bool, key: Array):
    size, rngs = config.hidden_size, nnx.Rngs(params=key)
    weights = dict(init_std=config.init_std, dtype=config.dtype, rngs=rngs)
    self.attention_norm = RMSNorm(size, eps=config.norm_eps)
    self.attention = LatentAttention(
      size, config.attention, norm_eps=config.norm_eps, **weights
    )
    self.ffn_norm = RMSNorm(size, eps=config.norm_eps)
    if has_experts:
      self.ffn = MoE(size, config.moe, **weights)
    else:
      self.ffn = SwiGLU(size, config.dense_size, **weights)
    # Random numbers of their own: a model starts alike with one stream and
    # with several where they are alike.
    own = nnx.Rngs(params=jax.random.fold_in(key, 2))
    self.attention_streams = _hyper_connections(config, own)
    self.ffn_streams = _hyper_connections(config, own)

  def __call__(
    self,
    streams: Hidden,
    context: Context,
    *,
    cache: LatentCache | None = None,
  ) -> BlockOutput:
    """Attention, then FFN.

    Args:
      streams: [B, L, G, D].
      context: context of the tokens.
      cache: the past, in decoding; see `LatentAttention`.
    """

    def attend(x):
      return self.attention(
        self.attention_norm(x),
        positions=context.positions,
        segments=context.segments,
        cache=cache,
      )

    def feed_forward(x):
      x = self.ffn_norm(x)
      if isinstance(self.ffn, MoE):
        return self.ffn(x, dispatch=context.dispatch)
      return self.ffn(x), None

    streams, cache = _around(attend, streams, self.attention_streams)
    streams, metrics = _around(feed_forward, streams, self.ffn_streams)
    return BlockOutput(streams, cache, metrics)


def _hyper_connections(config: ModelConfig, rngs: nnx.Rngs):
  if config.streams == 1:
    return None
  return HyperConnections(
    config.hidden_size,
    config.streams,
    eps=config.norm_eps,
    iterations=config.sinkhorn_iterations,
    init_std=config.init_std,
    rngs=rngs,
  )


def _around(sublayer, streams: Hidden, connections: HyperConnections | None):
  """The residual streams after a sublayer, and what else it returns.

  Args:
    sublayer: [B, L, D] to ([B, L, D], anything).
    streams: [B, L, G, D].
    connections: None with G = 1.
  """
  if connections is None:
    update, rest = sublayer(streams[:, :, 0])
    return streams + update[:, :, None], rest
  mixing = connections(streams)
  update, rest = sublayer(read(streams, mixing.pre))
  return write(streams, update, mixing.post, mixing.residual), rest


def _stack(config: ModelConfig, keys: Array, *, has_experts: bool):
  """One `Block` whose arrays are those of as many blocks as there are keys."""
  if not len(keys):
    return None
  make = nnx.vmap(lambda key: Block(config, has_experts=has_experts, key=key))
  return make(keys)


class Transformer(nnx.Module):
  """The decoder-only model. Its tables live elsewhere: see `memory.table`."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    weights = dict(init_std=config.init_std, rngs=rngs)
    shape = (config.vocab_size, config.hidden_size)
    self.embedding = Embedding(*shape, dtype=config.dtype, **weights)
    keys = jax.random.split(rngs.params(), config.num_layers)
    dense = num_dense_blocks(config)
    self.dense_blocks = _stack(config, keys[:dense], has_experts=False)
    self.moe_blocks = _stack(config, keys[dense:], has_experts=True)
    # As the hyper-connections: from random numbers of their own.
    memory = config.engram
    layers = () if memory is None else memory.layers
    own = [jax.random.fold_in(keys[layer], 1) for layer in layers]
    self.engrams = nnx.List(
      [_FUSIONS[memory.fusion](memory, rngs=nnx.Rngs(params=x)) for x in own]
    )
    self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
    tied = config.tie_embeddings
    self.head = (
      None if tied else normal_param(shape, axes=VOCABULARY, **weights)
    )

  def output_matrix(self) -> Float[Array, "V D"]:
    """The head's weights, float32: the embedding's where they are tied."""
    return (self.embedding.table if self.head is None else self.head)[...]

  def embed(self, token_ids: TokenIds) -> Hidden:
    """The residual streams [B, L, G, D] before the first block."""
    config = self.config
    embedded = self.embedding(token_ids)[:, :, None]
    shape = (*token_ids.shape, config.streams, config.hidden_size)
    return jnp.broadcast_to(embedded, shape)

  def unembed(
    self, streams: Hidden, *, at: Int[Array, "B"] | None = None
  ) -> Float[Array, "B L_or_1 D"]:
    """What the head makes logits of.

    Args:
      streams: [B, L, G, D], after the last block.
      at: int32 [B], the one position of each sequence that is wanted; None for
        all of them.
    """
    one = self.config.streams == 1
    hidden = streams[:, :, 0] if one else jnp.sum(streams, axis=2)
    if at is not None:
      hidden = jnp.take_along_axis(hidden, at[:, None, None], axis=1)
    return self.norm(hidden)

  def logits(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
    """float32 logits of what `unembed` returned."""
    return logits_of(hidden, self.output_matrix())

  def __call__(
    self,
    token_ids: TokenIds,
    rows: Mapping[int, Rows] | None,
    *,
    breaks: Breaks | None = None,
    dispatch: str | None = None,
    logits: bool = True,
    observe: Callable[[Hidden], Any] | None = None,
  ) -> ModelOutput:
    """Logits of the next token at every position.

    Args:
      token_ids: int32 [B, L], raw ids.
      rows: per Engram layer [B, L, K, d], what `lookup` read. None turns the
        memory off: no Engram layer adds anything.
      breaks: [B, L] of `Break`, as given to the hash. A document sees nothing
        of its neighbours, in attention, memory or convolution.
      dispatch: form of expert dispatch; None for the config's.
      logits: False for none at all: a loss in chunks makes them of `hidden`
        and `output_matrix` itself.
      observe: called with the residual streams [B, L, G, D] after each block;
        returns arrays, which are stacked in `observed`.

    Raises:
      InputError: rows of other layers than the model's, a wrong shape, or
        (outside jit) breaks that are none.
    """
    require_rows_of(self.config, rows)
    if breaks is None:
      counted = jnp.arange(token_ids.shape[1])
      layout = jnp.broadcast_to(counted, token_ids.shape), None
    else:
      shape = token_ids.shape
      valid = f"{shape}, as the tokens"
      require(breaks.shape == shape, "breaks.shape", breaks.shape, valid)
      layout = document_layout(breaks)
    context = Context(*layout, dispatch)

    streams, records, gates = self.embed(token_ids), [], {}
    for group in layer_groups(self.config):
      if group.engram is not None and rows is not None:
        layer = self.config.engram.layers[group.engram]
        fused = self._fuse(group.engram, streams, rows[layer], breaks)
        streams, gates[layer] = streams + fused.update, fused.gates
      streams, of_group = self._blocks(group, streams, context, observe)
      records += of_group
    hidden = self.unembed(streams)
    moe, observed = (_joined(parts) for parts in zip(*records))
    return ModelOutput(
      logits=self.logits(hidden) if logits else None,
      hidden=hidden,
      moe=moe,
      gates=gates,
      observed=observed,
    )

  def _fuse(
    self, number: int, streams: Hidden, rows: Rows, breaks: Breaks | None
  ) -> Fusion:
    """What Engram layer `number` adds to the streams."""
    graph, weights = nnx.split(self.engrams[number])
    dtype = self.config.dtype

    def fuse(weights, streams, rows):
      weights = sharding.for_compute(weights, dtype=dtype)
      return nnx.merge(graph, weights).fuse(streams, rows, breaks=breaks)

    return self._rematerialized(fuse)(weights, streams, rows)

  def _blocks(
    self,
    group: LayerGroup,
    streams: Hidden,
    context: Context,
    observe: Callable[[Hidden], Any] | None,
  ) -> tuple[Hidden, list[tuple[MoEMetrics | None, Any]]]:
    """The streams after the blocks of a group; metrics and observations.

    Their first axis is one of blocks.
    """
    graph, stack = nnx.split(getattr(self, group.kind))
    dtype = self.config.dtype

    def block(streams, weights):
      weights = sharding.for_compute(weights, dtype=dtype)
      streams, _, metrics = nnx.merge(graph, weights)(streams, context)
      return streams, (metrics, observe and observe(streams))

    block = self._rematerialized(block)
    if self.config.scan_blocks:
      weights = _at(stack, slice(group.start, group.stop))
      streams, record = jax.lax.scan(block, streams, weights)
      return streams, [record]

    records = []
    for i in range(group.start, group.stop):
      streams, record = block(streams, _at(stack, i))
      records.append(_at(record, None))
    return streams, records

  def _rematerialized(self, function):
    """The function with the config's choice of what its gradient keeps."""
    if self.config.remat == "none":
      return function
    keep = {
      "block": None,
      "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    }[self.config.remat]
    # In a loop nothing can undo the recomputation; outside, XLA would merge it
    # with the first computation and keep everything after all.
    in_loop = self.config.scan_blocks
    return jax.checkpoint(function, policy=keep, prevent_cse=not in_loop)


def _at(tree, index):
  """Each array of the tree at `index`."""
  return jax.tree.map(lambda x: x[index], tree)


def _joined(parts):
  """The trees as one along their first axis; None if all of them are."""
  parts = [part for part in parts if part is not None]
  return jax.tree.map(lambda *x: jnp.concatenate(x), *parts) if parts else None


def require_rows_of(
  config: ModelConfig, rows: Mapping[int, Rows] | None
) -> None:
  """Refuses rows of other layers than the model's Engram layers.

  Args:
    config: config of the model.
    rows: [B, L, K, d] per layer; None when the memory is off.
  """
  memory = config.engram
  expected = set() if memory is None or rows is None else set(memory.layers)
  given = set(rows or ())
  valid = f"rows of the Engram layers {sorted(expected)}, or None"
  require(given == expected, "rows", sorted(given), valid)
