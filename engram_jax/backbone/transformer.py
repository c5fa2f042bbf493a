"""The whole model: embedding, blocks, head. Rows come in, the table never does.

Block l, on residual streams H of shape [B, L, G, D]:

  H <- H + Engram_l(H, rows_l)         only at the Engram layers
  H <- H + Attention(RMSNorm(H))
  H <- H + FFN(RMSNorm(H))             SwiGLU in the leading blocks, then MoE

One residual stream for now: attention and FFN read it and write it back
(`read_streams`, `write_streams`: the two places that hyper-connections take).
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from engram_jax.backbone.attention import LatentAttention, LatentCache
from engram_jax.backbone.layers import (
  Embedding,
  RMSNorm,
  SwiGLU,
  normal_param,
)
from engram_jax.backbone.moe import MoE, MoEMetrics
from engram_jax.config import ModelConfig
from engram_jax.errors import require
from engram_jax.fusion.engram import Engram, init_conv_state
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
    logits: float32 [B, L, V]; [B, 1, V] with `logits_at`.
    cache: the cache after these tokens; None if none was given.
    moe: one `MoEMetrics` per block with experts, in the order of the blocks.
    gates: float32 [B, L, G] per Engram layer; empty when the memory is off.
  """

  logits: Float[Array, "B L_or_1 V"]
  cache: ModelCache | None
  moe: tuple[MoEMetrics, ...]
  gates: dict[int, Gates]


def read_streams(streams: Hidden) -> Float[Array, "B L D"]:
  """What a sublayer reads of the residual streams: the one there is."""
  return streams[:, :, 0]


def write_streams(streams: Hidden, update: Float[Array, "B L D"]) -> Hidden:
  """The residual streams after a sublayer's update."""
  return streams + update[:, :, None]


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
  """One block: Engram where the config puts one, attention, FFN."""

  def __init__(self, config: ModelConfig, layer: int, *, key: Array):
    size, rngs = config.hidden_size, nnx.Rngs(params=key)
    weights = dict(init_std=config.init_std, dtype=config.dtype, rngs=rngs)
    memory = config.engram
    has_memory = memory is not None and layer in memory.layers
    # From a stream of its own: a model with and one without a memory start
    # alike where they are alike.
    own = nnx.Rngs(params=jax.random.fold_in(key, 1))
    self.engram = Engram(memory, rngs=own) if has_memory else None
    self.attention_norm = RMSNorm(size, eps=config.norm_eps)
    self.attention = LatentAttention(
      size, config.attention, norm_eps=config.norm_eps, **weights
    )
    self.ffn_norm = RMSNorm(size, eps=config.norm_eps)
    if config.is_moe(layer):
      self.ffn = MoE(size, config.moe, **weights)
    else:
      self.ffn = SwiGLU(size, config.dense_size, **weights)

  def attend(self, streams, *, positions, segments, cache):
    """The streams after attention, and its cache."""
    update, cache = self.attention(
      self.attention_norm(read_streams(streams)),
      positions=positions,
      segments=segments,
      cache=cache,
    )
    return write_streams(streams, update), cache

  def feed_forward(self, streams, *, dispatch):
    """The streams after the FFN, and its `MoEMetrics` (None when dense)."""
    x, metrics = self.ffn_norm(read_streams(streams)), None
    if isinstance(self.ffn, MoE):
      update, metrics = self.ffn(x, dispatch=dispatch)
    else:
      update = self.ffn(x)
    return write_streams(streams, update), metrics


class Transformer(nnx.Module):
  """The decoder-only model. Its tables live elsewhere: see `memory.table`."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    weights = dict(init_std=config.init_std, rngs=rngs)
    shape = (config.vocab_size, config.hidden_size)
    self.embedding = Embedding(*shape, dtype=config.dtype, **weights)
    keys = jax.random.split(rngs.params(), config.num_layers)
    self.blocks = nnx.List(
      [Block(config, layer, key=key) for layer, key in enumerate(keys)]
    )
    self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
    tied = config.tie_embeddings
    self.head = None if tied else normal_param(shape[::-1], **weights)

  def init_cache(self, batch: int, capacity: int) -> ModelCache:
    """An empty cache for `batch` sequences of at most `capacity` tokens."""
    config = self.config
    memory = config.engram
    layers = () if memory is None else memory.layers
    return ModelCache(
      lengths=jnp.zeros(batch, jnp.int32),
      attention=tuple(
        block.attention.init_cache(batch, capacity, config.dtype)
        for block in self.blocks
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

    Raises:
      InputError: rows of other layers than the model's, lengths without a
        cache, or a wrong shape.
    """
    memory = self.config.engram
    expected = set() if memory is None or rows is None else set(memory.layers)
    given = set(rows or ())
    valid = f"rows of the Engram layers {sorted(expected)}, or None"
    require(given == expected, "rows", sorted(given), valid)
    without = lengths is not None and cache is None
    require(not without, "lengths", "given without a cache", "None")

    length = token_ids.shape[1]
    if cache is not None:
      positions, segments = cache.lengths[:, None] + jnp.arange(length), None
    elif breaks is not None:
      positions, segments = document_layout(breaks)
    else:
      positions = jnp.broadcast_to(jnp.arange(length), token_ids.shape)
      segments = None

    streams = self.embedding(token_ids)[:, :, None]
    attention_caches, conv_states, moe_metrics, gates = [], {}, [], {}
    for layer, block in enumerate(self.blocks):
      if block.engram is not None:
        state = None if cache is None else cache.conv[layer]
        if rows is not None:
          fused = block.engram.fuse(
            streams,
            rows[layer],
            state=state,
            breaks=breaks,
            lengths=lengths,
          )
          streams, state = streams + fused.update, fused.state
          gates[layer] = fused.gates
        conv_states[layer] = state
      streams, attention_cache = block.attend(
        streams,
        positions=positions,
        segments=segments,
        cache=None if cache is None else cache.attention[layer],
      )
      attention_caches.append(attention_cache)
      streams, metrics = block.feed_forward(streams, dispatch=dispatch)
      if metrics is not None:
        moe_metrics.append(metrics)

    hidden = read_streams(streams)
    if logits_at is not None:
      at = logits_at[:, None, None]
      hidden = jnp.take_along_axis(hidden, at, axis=1)
    hidden = self.norm(hidden)
    if self.head is None:
      logits = self.embedding.attend(hidden)
    else:
      head = self.head[...].astype(hidden.dtype)
      logits = jnp.einsum(
        "bld,dv->blv", hidden, head, preferred_element_type=jnp.float32
      )
    if cache is not None:
      added = length if lengths is None else lengths
      cache = ModelCache(
        cache.lengths + added, tuple(attention_caches), conv_states
      )
    return ModelOutput(logits, cache, tuple(moe_metrics), gates)
