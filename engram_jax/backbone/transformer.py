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
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from engram_jax import sharding
from engram_jax.backbone.attention import LatentAttention, LatentCache
from engram_jax.backbone.hyper_connections import HyperConnections, read, write
from engram_jax.backbone.layers import (
  VOCABULARY,
  Embedding,
  RMSNorm,
  SwiGLU,
  logits_of,
  normal_param,
)
from engram_jax.backbone.moe import MoE, MoEMetrics
from engram_jax.backbone.spans import (
  Span,
  below_memory,
  num_dense_blocks,
  spans,
)
from engram_jax.config import ModelConfig
from engram_jax.errors import require
from engram_jax.fusion.engram import Engram, Fusion, init_conv_state
from engram_jax.fusion.short_conv import ConvState
from engram_jax.types import Break, Breaks, Gates, Hidden, Rows, TokenIds


class ModelCache(NamedTuple):
  """What decoding keeps of the past; one document per sequence.

  Attributes:
    lengths: int32 [B], tokens so far.
    attention: one `LatentCache` per block.
    conv: per Engram layer, the convolution's state (None without one).
  """

  lengths: Int[Array, "B"]
  attention: tuple[LatentCache, ...]
  conv: dict[int, ConvState | None]


class ModelOutput(NamedTuple):
  """What a forward pass returns.

  Attributes:
    logits: float32 [B, L, V]; [B, 1, V] with `logits_at`; None if not wanted.
    hidden: [B, L, D] or [B, 1, D], what the head makes logits of.
    cache: the cache after these tokens; None if none was given.
    moe: of the blocks with experts, stacked: [n, E] and [n]; None without.
    gates: float32 [B, L, G] per Engram layer; empty when the memory is off.
  """

  logits: Float[Array, "B L_or_1 V"] | None
  hidden: Float[Array, "B L_or_1 D"]
  cache: ModelCache | None
  moe: MoEMetrics | None
  gates: dict[int, Gates]


class Begun(NamedTuple):
  """A forward pass that has come to the first Engram layer; a pytree.

  Attributes:
    streams: [B, L, G, D].
    positions: int32 [B, L], of the tokens in their documents.
    segments: int32 [B, L], numbers of documents; None for one a sequence.
    moe: of the spans with experts so far.
  """

  streams: Hidden
  positions: Int[Array, "B L"]
  segments: Int[Array, "B L"] | None
  moe: tuple[MoEMetrics, ...]


def document_layout(
  breaks: Breaks,
) -> tuple[Int[Array, "B L"], Int[Array, "B L"]]:
  """Position within its document, and number of its document, per token.

  Args:
    breaks: [B, L] of `Break`; only document starts count here.

  Returns:
    int32 [B, L] positions from 0, and int32 [B, L] segments.
  """
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
    *,
    positions: Int[Array, "B L"],
    segments: Int[Array, "B L"] | None,
    cache: LatentCache | None,
    dispatch: str | None,
  ) -> tuple[Hidden, LatentCache | None, MoEMetrics | None]:
    """The streams after the block; arguments as of `Transformer`."""
    metrics = None

    def attend(x):
      nonlocal cache
      y, cache = self.attention(
        self.attention_norm(x),
        positions=positions,
        segments=segments,
        cache=cache,
      )
      return y

    def feed_forward(x):
      nonlocal metrics
      x = self.ffn_norm(x)
      if not isinstance(self.ffn, MoE):
        return self.ffn(x)
      y, metrics = self.ffn(x, dispatch=dispatch)
      return y

    streams = _around(attend, streams, self.attention_streams)
    streams = _around(feed_forward, streams, self.ffn_streams)
    return streams, cache, metrics


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
  """The residual streams after a sublayer [B, L, D] -> [B, L, D]."""
  if connections is None:
    return streams + sublayer(streams[:, :, 0])[:, :, None]
  mixing = connections(streams)
  update = sublayer(read(streams, mixing.pre))
  return write(streams, update, mixing.post, mixing.residual)


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
      [Engram(memory, rngs=nnx.Rngs(params=key)) for key in own]
    )
    self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
    tied = config.tie_embeddings
    self.head = (
      None if tied else normal_param(shape, axes=VOCABULARY, **weights)
    )

  def output_matrix(self) -> Float[Array, "V D"]:
    """The head's weights, float32: the embedding's where they are tied."""
    return (self.embedding.table if self.head is None else self.head)[...]

  def init_cache(self, batch: int, capacity: int) -> ModelCache:
    """An empty cache for `batch` sequences of at most `capacity` tokens."""
    config = self.config
    memory = config.engram
    layers = () if memory is None else memory.layers
    blocks = self.dense_blocks or self.moe_blocks
    one = blocks[0] if isinstance(blocks, nnx.List) else blocks
    return ModelCache(
      lengths=jnp.zeros(batch, jnp.int32),
      attention=tuple(
        one.attention.init_cache(batch, capacity, config.dtype)
        for _ in range(config.num_layers)
      ),
      conv={layer: init_conv_state(memory, batch) for layer in layers},
    )

  def __call__(
    self,
    token_ids: TokenIds,
    rows: Mapping[int, Rows] | None,
    *,
    breaks: Breaks | None = None,
    cache: ModelCache | None = None,
    lengths: Int[Array, "B"] | None = None,
    dispatch: str | None = None,
    logits_at: Int[Array, "B"] | None = None,
    logits: bool = True,
  ) -> ModelOutput:
    """Logits of the next token at every position.

    Args:
      token_ids: int32 [B, L], raw ids.
      rows: per Engram layer [B, L, K, d], what `lookup` read. None turns the
        memory off: no Engram layer adds anything.
      breaks: [B, L] of `Break`, as given to the hash. A document sees nothing
        of its neighbours, in attention, memory or convolution.
      cache: the past; these tokens are then appended to it, and `breaks` may
        hold no document start.
      lengths: int32 [B], at least 1: how many of the L tokens are real when a
        cache is given and prompts are padded on the right.
      dispatch: of the experts; None for the config's.
      logits_at: int32 [B], one position per sequence whose logits are wanted
        (a prompt's last token): they alone are computed, [B, 1, V]. None for
        all positions.
      logits: False for none at all: a loss in chunks makes them of `hidden`
        and `output_matrix` itself.

    Raises:
      InputError: rows of other layers than the model's, lengths without a
        cache, or a wrong shape.
    """
    begun, cache = self.begin(
      token_ids, breaks=breaks, cache=cache, dispatch=dispatch
    )
    return self.finish(
      begun,
      rows,
      breaks=breaks,
      cache=cache,
      lengths=lengths,
      dispatch=dispatch,
      logits_at=logits_at,
      logits=logits,
    )

  def begin(
    self,
    token_ids: TokenIds,
    *,
    breaks: Breaks | None = None,
    cache: ModelCache | None = None,
    dispatch: str | None = None,
  ) -> tuple[Begun, ModelCache | None]:
    """The part of a call that needs no rows: up to the first Engram layer.

    `finish` is the rest. Whoever compiles the two apart keeps the device busy
    while rows are fetched; a call is nothing but both. Arguments as there.

    Returns:
      What `finish` goes on from; and the cache, in which the blocks so far
      hold these tokens, and `lengths` does not count them yet.
    """
    config, length = self.config, token_ids.shape[1]
    if cache is not None:
      positions, segments = cache.lengths[:, None] + jnp.arange(length), None
    elif breaks is not None:
      positions, segments = document_layout(breaks)
    else:
      positions = jnp.broadcast_to(jnp.arange(length), token_ids.shape)
      segments = None

    embedded = self.embedding(token_ids)[:, :, None]
    shape = (*token_ids.shape, config.streams, config.hidden_size)
    begun = Begun(
      jnp.broadcast_to(embedded, shape), positions, segments, moe=()
    )
    for span in below_memory(config):
      begun, cache = self._blocks(span, begun, cache, dispatch)
    return begun, cache

  def finish(
    self,
    begun: Begun,
    rows: Mapping[int, Rows] | None,
    *,
    breaks: Breaks | None = None,
    cache: ModelCache | None = None,
    lengths: Int[Array, "B"] | None = None,
    dispatch: str | None = None,
    logits_at: Int[Array, "B"] | None = None,
    logits: bool = True,
  ) -> ModelOutput:
    """The part of a call from the first Engram layer on.

    Args:
      begun: from `begin`.
      rows: as in a call, like all that follow.
      breaks: as given to `begin`.
      cache: that `begin` returned.
      lengths: see the call.
      dispatch: as given to `begin`.
      logits_at: see the call.
      logits: see the call.

    Raises:
      InputError: as a call.
    """
    config, memory = self.config, self.config.engram
    expected = set() if memory is None or rows is None else set(memory.layers)
    given = set(rows or ())
    valid = f"rows of the Engram layers {sorted(expected)}, or None"
    require(given == expected, "rows", sorted(given), valid)
    without = lengths is not None and cache is None
    require(not without, "lengths", "given without a cache", "None")

    gates = {}
    for span in spans(config)[len(below_memory(config)) :]:
      if span.engram is not None and rows is not None:
        layer = memory.layers[span.engram]
        fused = self._fuse(
          span.engram,
          begun.streams,
          rows[layer],
          state=None if cache is None else cache.conv[layer],
          breaks=breaks,
          lengths=lengths,
        )
        begun = begun._replace(streams=begun.streams + fused.update)
        gates[layer] = fused.gates
        if cache is not None:
          conv = cache.conv | {layer: fused.state}
          cache = cache._replace(conv=conv)
      begun, cache = self._blocks(span, begun, cache, dispatch)

    streams = begun.streams
    hidden = (
      jnp.sum(streams, axis=2) if config.streams > 1 else streams[:, :, 0]
    )
    if logits_at is not None:
      at = logits_at[:, None, None]
      hidden = jnp.take_along_axis(hidden, at, axis=1)
    hidden = self.norm(hidden)
    values = logits_of(hidden, self.output_matrix()) if logits else None
    if cache is not None:
      added = streams.shape[1] if lengths is None else lengths
      cache = cache._replace(lengths=cache.lengths + added)
    moe = None
    if begun.moe:
      moe = jax.tree.map(lambda *x: jnp.concatenate(x), *begun.moe)
    return ModelOutput(values, hidden, cache, moe, gates)

  def _fuse(
    self, number: int, streams: Hidden, rows: Rows, **context
  ) -> Fusion:
    """What Engram layer `number` adds to the streams."""
    graph, weights = nnx.split(self.engrams[number])
    dtype = self.config.dtype

    def fuse(weights, streams, rows):
      weights = sharding.for_compute(weights, dtype=dtype)
      return nnx.merge(graph, weights).fuse(streams, rows, **context)

    return self._rematerialized(fuse)(weights, streams, rows)

  def _blocks(
    self,
    span: Span,
    begun: Begun,
    cache: ModelCache | None,
    dispatch: str | None,
  ) -> tuple[Begun, ModelCache | None]:
    """The pass, and the cache, after the blocks of a span."""
    blocks = getattr(self, span.kind)
    apart = isinstance(blocks, nnx.List)  # see `decoding.weights`
    graph, stack = nnx.split(blocks[0] if apart else blocks)
    context = dict(
      positions=begun.positions, segments=begun.segments, dispatch=dispatch
    )
    dtype = self.config.dtype

    def block(streams, weights, cache):
      weights = sharding.for_compute(weights, dtype=dtype)
      return nnx.merge(graph, weights)(streams, cache=cache, **context)

    streams, moe = begun.streams, list(begun.moe)
    if cache is None and self.config.scan_blocks and not apart:

      def step(streams, weights):
        streams, _, metrics = block(streams, weights, None)
        return streams, metrics

      weights = _at(stack, slice(span.start, span.stop))
      step = self._rematerialized(step)
      streams, metrics = jax.lax.scan(step, streams, weights)
      if metrics is not None:
        moe.append(metrics)
      return begun._replace(streams=streams, moe=tuple(moe)), None

    if cache is None:
      block = self._rematerialized(block)
    caches = [] if cache is None else list(cache.attention)
    in_moe = span.kind == "moe_blocks"
    first = num_dense_blocks(self.config) if in_moe else 0
    for i in range(span.start, span.stop):
      at = first + i
      here = None if cache is None else caches[at]
      weights = nnx.state(blocks[i]) if apart else _at(stack, i)
      streams, here, metrics = block(streams, weights, here)
      if cache is not None:
        caches[at] = here
      if metrics is not None:
        moe.append(_at(metrics, None))
    if cache is not None:
      cache = cache._replace(attention=tuple(caches))
    return begun._replace(streams=streams, moe=tuple(moe)), cache

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
