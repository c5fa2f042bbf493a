"""Attention in blocks: memory grows with the length, not with its square.

For one block of queries, over the blocks of keys in turn (online softmax, as
in FlashAttention, arXiv 2205.14135 and 2307.08691):

  s = scale * q k^T                        masked: no weight
  m' = max(m, max s)
  z' = z exp(m - m') + sum exp(s - m')     o' = o exp(m - m') + exp(s - m') v
  y = o / z,  e = m + ln z                 e: log of the sum of exponentials

The gradient keeps y and e and makes the weights again, block by block:

  a = exp(s - e)                  dv = a^T dy
  ds = a * (dy v^T - dy . y)      dq = scale * ds k,  dk = scale * ds^T q

Scores, m, z, e and all sums over blocks are float32. Axes besides those of
`types.py`:

  S  keys            heads  attention heads      Q  query and key width
  W  value width     q, k   of one block: its queries, its keys
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from engram_jax.errors import require

# Not -inf: the difference of two would be NaN.
_LOWEST = float(jnp.finfo(jnp.float32).min)


class _Blocks(NamedTuple):
  """What is known when the program is compiled.

  Attributes:
    queries: queries of a block; they divide L.
    keys: keys of a block; they divide S.
    scale: factor on the scores.
  """

  queries: int
  keys: int
  scale: float


def _take(array: Array, block: Int[Array, ""], size: int) -> Array:
  """Block number `block` of axis 1."""
  return jax.lax.dynamic_slice_in_dim(array, block * size, size, axis=1)


def _add(array: Array, block: Int[Array, ""], update: Array) -> Array:
  """`array` with `update` added to block number `block` of axis 1."""
  size = update.shape[1]
  total = _take(array, block, size) + update
  return jax.lax.dynamic_update_slice_in_dim(array, total, block * size, axis=1)


def _join(blocks: Array) -> Array:
  """`[blocks, B, size, ...]`, as a scan stacks them, to `[B, L, ...]`."""
  blocks = jnp.moveaxis(blocks, 0, 1)
  return blocks.reshape(blocks.shape[0], -1, *blocks.shape[3:])


def _product(equation: str, *arrays: Array) -> Float32[Array, "..."]:
  """An einsum that sums in float32."""
  return jnp.einsum(equation, *arrays, preferred_element_type=jnp.float32)


def _schedule(
  last_key: Int[Array, "#B L"], blocks: _Blocks
) -> tuple[Int[Array, "n"], Int[Array, "n"]]:
  """Per block of queries its number, and how many blocks of keys it sees.

  The blocks behind are not computed: the count ends a loop.
  """
  by_block = last_key.reshape(last_key.shape[0], -1, blocks.queries)
  counts = jnp.max(by_block, axis=(0, 2)) // blocks.keys + 1
  return jnp.arange(by_block.shape[1]), counts


def _scores(
  query: Float[Array, "B q heads Q"],
  key: Float[Array, "B k heads Q"],
  i: Int[Array, ""],
  j: Int[Array, ""],
  last_key: Int[Array, "#B L"],
  segments: Int[Array, "B L"] | None,
  blocks: _Blocks,
) -> tuple[Float32[Array, "B heads q k"], Bool[Array, "#B 1 q k"]]:
  """Scores of query block i and key block j, and which of them count."""
  scores = blocks.scale * _product("bqhd,bkhd->bhqk", query, key)
  keys = j * blocks.keys + jnp.arange(blocks.keys)
  seen = keys <= _take(last_key, i, blocks.queries)[:, :, None]
  if segments is not None:
    own = _take(segments, i, blocks.queries)
    theirs = _take(segments, j, blocks.keys)
    seen = seen & (own[:, :, None] == theirs[:, None, :])
  return scores, seen[:, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(blocks, query, key, value, last_key, segments):
  """`blockwise_attention` of whole blocks."""
  arrays = (query, key, value, last_key, segments)
  return _attend_forward(blocks, *arrays)[0]


def _attend_forward(blocks, query, key, value, last_key, segments):
  """The output `[B, L, heads, W]`, and what its gradient needs."""
  batch, _, heads, _ = query.shape
  rows = (batch, heads, blocks.queries)

  def query_block(_, item):
    i, count = item
    q = _take(query, i, blocks.queries)

    def key_block(j, carry):
      out, top, total = carry
      k, v = (_take(array, j, blocks.keys) for array in (key, value))
      scores, seen = _scores(q, k, i, j, last_key, segments, blocks)
      highest = jnp.max(jnp.where(seen, scores, _LOWEST), axis=-1)
      new_top = jnp.maximum(top, highest)
      weights = jnp.where(seen, jnp.exp(scores - new_top[..., None]), 0)
      shrink = jnp.exp(top - new_top)
      total = shrink * total + jnp.sum(weights, axis=-1)
      mixed = _product("bhqk,bkhw->bhqw", weights.astype(value.dtype), v)
      return shrink[..., None] * out + mixed, new_top, total

    start = (
      jnp.zeros((*rows, value.shape[-1]), jnp.float32),
      jnp.full(rows, _LOWEST, jnp.float32),
      jnp.zeros(rows, jnp.float32),
    )
    out, top, total = jax.lax.fori_loop(0, count, key_block, start)
    # A query that sees no key: its output is 0.
    total = jnp.where(total == 0, 1, total)
    out = (out / total[..., None]).astype(value.dtype)
    return None, (
      jnp.swapaxes(out, 1, 2),
      jnp.swapaxes(top + jnp.log(total), 1, 2),
    )

  schedule = _schedule(last_key, blocks)
  _, stacked = jax.lax.scan(query_block, None, schedule)
  out, log_sum = map(_join, stacked)
  return out, (query, key, value, last_key, segments, out, log_sum)


def _attend_backward(blocks, residuals, d_out):
  """Gradients of the queries, keys and values; each in its own dtype."""
  query, key, value, last_key, segments, out, log_sum = residuals
  mean = jnp.sum(d_out.astype(jnp.float32) * out, axis=-1)

  def per_row(array, i):
    """`[B, L, heads]` to block i's `[B, heads, q, 1]`."""
    return jnp.swapaxes(_take(array, i, blocks.queries), 1, 2)[..., None]

  def query_block(carry, item):
    i, count = item
    q, dy = (_take(array, i, blocks.queries) for array in (query, d_out))
    log_sum_i, mean_i = per_row(log_sum, i), per_row(mean, i)

    def key_block(j, carry):
      d_q, d_key, d_value = carry
      k, v = (_take(array, j, blocks.keys) for array in (key, value))
      scores, seen = _scores(q, k, i, j, last_key, segments, blocks)
      weights = jnp.where(seen, jnp.exp(scores - log_sum_i), 0)
      d_weights = _product("bqhw,bkhw->bhqk", dy, v)
      d_scores = blocks.scale * weights * (d_weights - mean_i)
      weights, d_scores = (
        array.astype(query.dtype) for array in (weights, d_scores)
      )
      return (
        d_q + _product("bhqk,bkhd->bqhd", d_scores, k),
        _add(d_key, j, _product("bhqk,bqhd->bkhd", d_scores, q)),
        _add(d_value, j, _product("bhqk,bqhw->bkhw", weights, dy)),
      )

    start = (jnp.zeros(q.shape, jnp.float32), *carry)
    d_q, *carry = jax.lax.fori_loop(0, count, key_block, start)
    return tuple(carry), d_q.astype(query.dtype)

  start = tuple(jnp.zeros(array.shape, jnp.float32) for array in (key, value))
  schedule = _schedule(last_key, blocks)
  (d_key, d_value), d_query = jax.lax.scan(query_block, start, schedule)
  d_key, d_value = d_key.astype(key.dtype), d_value.astype(value.dtype)
  return _join(d_query), d_key, d_value, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _pad(array: Array, size: int, fill: int = 0) -> Array:
  """`array` with axis 1 filled up to whole blocks."""
  widths = [(0, 0)] * array.ndim
  widths[1] = (0, -array.shape[1] % size)
  return jnp.pad(array, widths, constant_values=fill)


def blockwise_attention(
  query: Float[Array, "B L heads Q"],
  key: Float[Array, "B S heads Q"],
  value: Float[Array, "B S heads W"],
  last_key: Int[Array, "#B L"],
  segments: Int[Array, "B L"] | None = None,
  *,
  scale: float,
  block_size: int,
) -> Float[Array, "B L heads W"]:
  """`plain_attention` in blocks, under a mask that is never made as a whole.

  The query at l sees the keys 0..last_key[l], and of these only its own
  segment's. One that sees no key gives 0. Blocks of keys behind the last that
  any query of a block sees, in any sequence of the batch, are not computed.
  Memory beside the arguments and gradients themselves is that of a few
  `[B, block_size, block_size]` arrays a head, and the gradients' float32 sums.

  There is no forward-mode derivative.

  Args:
    query: `[B, L, heads, Q]`, any float dtype.
    key: `[B, S, heads, Q]`, in the dtype of `query`.
    value: `[B, S, heads, W]`, in the dtype of `query`.
    last_key: int, per query the index of the last key that it sees:
      `arange(L)[None]` for causal attention of a sequence to itself. An index
      beyond S - 1 means S - 1; a negative one, no key.
    segments: int, per query and key (then L = S); None for no limit.
    scale: factor on the scores.
    block_size: queries, and keys, of one block. The length need not be whole
      blocks.

  Returns:
    `[B, L, heads, W]` in the dtype of `value`.

  Raises:
    InputError: `block_size` is not above 0; segments where L and S differ.
  """
  length, keys = query.shape[1], key.shape[1]
  require(block_size > 0, "block_size", block_size, "a number above 0")
  require(
    segments is None or length == keys,
    "segments",
    f"given with {length} queries and {keys} keys",
    "None, or as many keys as queries",
  )
  blocks = _Blocks(min(block_size, length), min(block_size, keys), scale)
  if segments is not None:
    segments = _pad(segments, blocks.queries)
  out = _attend(
    blocks,
    _pad(query, blocks.queries),
    _pad(key, blocks.keys),
    _pad(value, blocks.keys),
    _pad(jnp.clip(last_key, -1, keys - 1), blocks.queries, fill=-1),
    segments,
  )
  return out[:, :length]
