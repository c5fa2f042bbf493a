"""Multi-head latent attention and its cache (DeepSeek-V2 §2.1, V3 §2.1.1).

  c = RMSNorm(h W_DKV)                       latent, width C
  k_nope = c W_UK,  v = c W_UV               per head
  k_rope = RoPE(h W_KR)                      one for all heads
  q = h W_Q, its last P features rotated     per head
  a = softmax((q_nope . k_nope + q_rope . k_rope) * m^2 / sqrt(N + P))
  y = W_O concat_heads(a v)

m is 1 unless YaRN stretches the positions (`yarn.py`).

The cache holds c and k_rope alone. Two forms of the same function: the full
form makes keys and values of every head; the absorbed form moves W_UK to the
query and W_UV behind the weighted sum, so that a decode step reads nothing but
the cache. The full form can also be computed in blocks, in memory that grows
with the length alone (`blockwise_attention.py`). Axes besides those of
`types.py` (N here is not the n-gram order):

  S  keys: L, or the cache's capacity   heads  attention heads
  N  width of a head without position   P      rotary width
  Q  query and key width, N + P         W      value width
  C  latent width (the KV rank)
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from engram_jax.backbone.blockwise_attention import blockwise_attention
from engram_jax.backbone.layers import (
  RMSNorm,
  normal_param,
  require_dtype,
  require_width,
  rotary,
)
from engram_jax.backbone.yarn import yarn_frequencies, yarn_softmax_factor
from engram_jax.config import AttentionConfig
from engram_jax.errors import require


class LatentCache(NamedTuple):
  """What decoding keeps of the past: one document per sequence.

  Slot s holds the token at position s. A slot beyond a sequence's last token
  may hold anything: no query reads it before its own token is written.

  Attributes:
    latent: `[B, S, C]`, after its norm.
    rope_key: `[B, S, P]`, rotated.
  """

  latent: Float[Array, "B S C"]
  rope_key: Float[Array, "B S P"]


def _softmax(
  scores: Float[Array, "B heads L S"], mask: Bool[Array, "#B L S"]
) -> Float[Array, "B heads L S"]:
  """Masked softmax in float32."""
  # Not -inf: a query that may see no key then gives finite numbers, which
  # nobody reads, instead of NaN, which would reach every gradient.
  lowest = jnp.finfo(jnp.float32).min
  masked = jnp.where(mask[:, None], scores.astype(jnp.float32), lowest)
  return jax.nn.softmax(masked, axis=-1)


def plain_attention(
  query: Float[Array, "B L heads Q"],
  key: Float[Array, "B S heads Q"],
  value: Float[Array, "B S heads W"],
  mask: Bool[Array, "#B L S"],
  *,
  scale: float,
) -> Float[Array, "B L heads W"]:
  """softmax(scale * query . key) value, scores and softmax in float32.

  Args:
    query: [B, L, heads, Q].
    key: [B, S, heads, Q].
    value: [B, S, heads, W].
    mask: bool [B or 1, L, S], True where a query may see a key.
    scale: factor on the scores.
  """
  scores = jnp.einsum(
    "blhq,bshq->bhls", query, key, preferred_element_type=jnp.float32
  )
  weights = _softmax(scores * scale, mask).astype(value.dtype)
  return jnp.einsum("bhls,bshw->blhw", weights, value)


def core_attention(
  query: Float[Array, "B L heads Q"],
  key: Float[Array, "B S heads Q"],
  value: Float[Array, "B S heads W"],
  mask: Bool[Array, "#B L S"],
  *,
  scale: float,
) -> Float[Array, "B L heads W"]:
  """`plain_attention`, by `jax.nn.dot_product_attention` where that fits.

  It fits when values are as wide as keys (Q = W).

  Args:
    query: `[B, L, heads, Q]`.
    key: `[B, S, heads, Q]`.
    value: `[B, S, heads, W]`, in the dtype of `query` and `key`.
    mask: True where a query may see a key.
    scale: factor on the scores.

  Returns:
    `[B, L, heads, W]` in the dtype of `value`.
  """
  if query.shape[-1] != value.shape[-1]:
    return plain_attention(query, key, value, mask, scale=scale)
  return jax.nn.dot_product_attention(
    query, key, value, mask=mask[:, None], scale=scale
  )


def heads_of_latent(
  query_nope: Float[Array, "B L heads N"],
  query_rope: Float[Array, "B L heads P"],
  latent: Float[Array, "B S C"],
  rope_key: Float[Array, "B S P"],
  key_up: Float[Array, "C heads N"],
  value_up: Float[Array, "C heads W"],
) -> tuple[
  Float[Array, "B L heads Q"],
  Float[Array, "B S heads Q"],
  Float[Array, "B S heads W"],
]:
  """Queries, keys and values of every head: the full form's operands.

  Args:
    query_nope: `[B, L, heads, N]`.
    query_rope: `[B, L, heads, P]`, rotated.
    latent: `[B, S, C]`.
    rope_key: `[B, S, P]`, rotated; shared by all heads.
    key_up: W_UK, `[C, heads, N]`.
    value_up: W_UV, `[C, heads, W]`.

  Returns:
    `[B, L, heads, Q]`, `[B, S, heads, Q]` and `[B, S, heads, W]`.
  """
  key_nope = jnp.einsum("bsc,chn->bshn", latent, key_up)
  value = jnp.einsum("bsc,chw->bshw", latent, value_up)
  shape = (*key_nope.shape[:-1], rope_key.shape[-1])
  key_rope = jnp.broadcast_to(rope_key[:, :, None], shape)
  query = jnp.concatenate([query_nope, query_rope], axis=-1)
  key = jnp.concatenate([key_nope, key_rope], axis=-1)
  return query, key, value


def latent_attention_absorbed(
  query_nope: Float[Array, "B L heads N"],
  query_rope: Float[Array, "B L heads P"],
  latent: Float[Array, "B S C"],
  rope_key: Float[Array, "B S P"],
  key_up: Float[Array, "C heads N"],
  value_up: Float[Array, "C heads W"],
  mask: Bool[Array, "#B L S"],
  *,
  scale: float,
) -> Float[Array, "B L heads W"]:
  """Attention without keys or values of the single heads.

  The same as `core_attention(*heads_of_latent(...), mask, scale=scale)`.

  Scores cost `heads * (C + P)` per pair of tokens instead of `heads * Q`, but
  nothing of size `S * heads` is made: right for a few queries on a long cache.

  Args:
    query_nope: [B, L, heads, N], the part of the queries without positions.
    query_rope: [B, L, heads, P], the rotated part.
    latent: [B, S, C].
    rope_key: [B, S, P], the rotated key that all heads share.
    key_up: [C, heads, N], from latents to keys.
    value_up: [C, heads, W], from latents to values.
    mask: bool [B or 1, L, S], True where a query may see a key.
    scale: factor on the scores.
  """
  query_latent = jnp.einsum("blhn,chn->blhc", query_nope, key_up)
  scores = jnp.einsum(
    "blhc,bsc->bhls", query_latent, latent, preferred_element_type=jnp.float32
  ) + jnp.einsum(
    "blhp,bsp->bhls", query_rope, rope_key, preferred_element_type=jnp.float32
  )
  weights = _softmax(scores * scale, mask).astype(latent.dtype)
  mixed = jnp.einsum("bhls,bsc->blhc", weights, latent)
  return jnp.einsum("blhc,chw->blhw", mixed, value_up)


def causal_mask(
  length: int, segments: Int[Array, "B L"] | None = None
) -> Bool[Array, "#B L L"]:
  """Token l sees tokens 0..l, and of these only its own segment's.

  Args:
    length: L, number of positions.
    segments: int [B, L], the document of each position; None for one document.
  """
  mask = jnp.tril(jnp.ones((1, length, length), bool))
  if segments is None:
    return mask
  return mask & (segments[:, :, None] == segments[:, None, :])


def write_cache(
  cache: LatentCache,
  latent: Float[Array, "B L C"],
  rope_key: Float[Array, "B L P"],
  positions: Int[Array, "B L"],
) -> LatentCache:
  """The cache with L new tokens at their positions.

  A position outside `0 <= position < S` writes nothing. The positions of one
  sequence must differ from each other.

  Args:
    cache: the past of B sequences, S places each.
    latent: [B, L, C], latents of the new tokens.
    rope_key: [B, L, P], their rotated keys.
    positions: int [B, L], their places in the cache.
  """
  capacity = cache.latent.shape[1]
  # A negative index would count from the end before it is found to be outside.
  slots = jnp.where(positions < 0, capacity, positions)
  rows = jnp.arange(slots.shape[0])[:, None]

  def put(old, new):
    return old.at[rows, slots].set(new.astype(old.dtype), mode="drop")

  return LatentCache(put(cache.latent, latent), put(cache.rope_key, rope_key))


class LatentAttention(nnx.Module):
  """Multi-head latent attention; the 27B family's, without a query rank."""

  def __init__(
    self,
    hidden_size: int,
    config: AttentionConfig,
    *,
    norm_eps: float,
    init_std: float,
    dtype: str,
    rngs: nnx.Rngs,
  ):
    require_dtype(dtype)
    self.config, self.dtype = config, dtype
    heads, rank = config.num_heads, config.kv_rank
    nope, rope, value = config.nope_dim, config.rope_dim, config.value_dim

    def matrix(rows: dict[str, int], columns: dict[str, int]) -> nnx.Variable:
      return normal_param(
        (*rows.values(), *columns.values()),
        axes=(*rows, *columns),
        matrix=(tuple(rows), tuple(columns)),
        init_std=init_std,
        rngs=rngs,
      )

    # A matrix makes all heads, or is made from all of them.
    def of_heads(head_dim: int) -> dict[str, int]:
      return {"heads": heads, "head_dim": head_dim}

    embed, latent = {"embed": hidden_size}, {"latent": rank}
    self.kv_down = matrix(embed, latent)
    self.kv_norm = RMSNorm(rank, eps=norm_eps)
    self.key_up = matrix(latent, of_heads(nope))
    self.value_up = matrix(latent, of_heads(value))
    self.key_rope = matrix(embed, {"rope": rope})
    self.query = matrix(embed, of_heads(nope + rope))
    self.out = matrix(of_heads(value), embed)

  def init_cache(self, batch: int, capacity: int, dtype: str) -> LatentCache:
    """An empty cache for `batch` sequences of at most `capacity` tokens.

    Args:
      batch: B, number of sequences.
      capacity: S, most tokens of one sequence.
      dtype: dtype of the latents and keys.
    """
    require_dtype(dtype)
    require(batch > 0, "batch", batch, "a number above 0")
    require(capacity > 0, "capacity", capacity, "a number above 0")
    latent = jnp.zeros((batch, capacity, self.config.kv_rank), dtype)
    rope_key = jnp.zeros((batch, capacity, self.config.rope_dim), dtype)
    return LatentCache(latent, rope_key)

  def __call__(
    self,
    x: Float[Array, "B L D"],
    *,
    positions: Int[Array, "B L"],
    segments: Int[Array, "B L"] | None = None,
    cache: LatentCache | None = None,
  ) -> tuple[Float[Array, "B L D"], LatentCache | None]:
    """Attention over the sequence itself, or over the cache and the sequence.

    Without a cache token l sees the tokens 0..l of its own segment. With a
    cache the new tokens are written at their positions, and the token at
    position p sees the slots 0..p. So prompts of unequal lengths share a batch
    when they are padded on the right: a padding token's slot is overwritten by
    the true token of that position before any query sees it. A position
    outside the cache's capacity writes nothing, and the output at it means
    nothing; whoever decodes allots the capacity.

    With a `block_size` a sequence, and a prompt of more than one block, is
    compared in blocks, and memory grows with its length and not its square.

    Args:
      x: `[B, L, D]`, normed hidden states.
      positions: int `[B, L]`, rotary positions; from 0 in every document.
      segments: int `[B, L]`, equal within a packed document and nowhere else
        in the sequence; None for one document per sequence.
      cache: the past, or None.

    Returns:
      `[B, L, D]` in the compute dtype, and the cache with the new tokens (None
      without a cache).

    Raises:
      InputError: segments together with a cache; shapes that do not fit.
    """
    require_width("x", x, self.kv_down.shape[0])
    require(
      positions.shape == x.shape[:2],
      "positions.shape",
      positions.shape,
      f"x's batch and length, {x.shape[:2]}",
    )
    require(
      segments is None or cache is None,
      "segments",
      "given with a cache",
      "None: a cached sequence is one document",
    )
    config, dtype, length = self.config, self.dtype, x.shape[1]
    frequencies = yarn_frequencies(
      config.rope_dim, config.rope_theta, config.yarn
    )
    scale = 1 / math.sqrt(config.nope_dim + config.rope_dim)
    scale *= yarn_softmax_factor(config.yarn)
    x = x.astype(dtype)

    query = jnp.einsum("bld,dhq->blhq", x, self.query[...].astype(dtype))
    query_nope, query_rope = jnp.split(query, [config.nope_dim], axis=-1)
    query_rope = rotary(query_rope, positions, frequencies=frequencies)
    latent = self.kv_norm(x @ self.kv_down[...].astype(dtype))
    rope_key = (x @ self.key_rope[...].astype(dtype))[:, :, None]
    rope_key = rotary(rope_key, positions, frequencies=frequencies)[:, :, 0]

    blockwise = config.block_size > 0
    if cache is None:
      last_key = jnp.arange(length)[None]
    else:
      require(
        cache.latent.shape[0] == x.shape[0],
        "cache.latent.shape",
        cache.latent.shape,
        f"x's batch of {x.shape[0]}",
      )
      cache = write_cache(cache, latent, rope_key, positions)
      latent, rope_key = (array.astype(dtype) for array in cache)
      last_key = positions
      # For fewer queries the absorbed form is as small, and reads no more than
      # the cache.
      blockwise = blockwise and length > config.block_size

    up = (self.key_up[...].astype(dtype), self.value_up[...].astype(dtype))
    operands = (query_nope, query_rope, latent, rope_key, *up)
    if blockwise:
      mixed = blockwise_attention(
        *heads_of_latent(*operands),
        last_key,
        segments,
        scale=scale,
        block_size=config.block_size,
      )
    elif cache is None:
      mask = causal_mask(length, segments)
      mixed = core_attention(*heads_of_latent(*operands), mask, scale=scale)
    else:
      mask = jnp.arange(latent.shape[1]) <= last_key[:, :, None]
      mixed = latent_attention_absorbed(*operands, mask, scale=scale)
    y = jnp.einsum("blhw,hwd->bld", mixed, self.out[...].astype(dtype))
    return y, cache
