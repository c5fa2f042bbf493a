"""Decoding step by step: what is kept of the past, and how it grows.

A step is the same pure function as the whole sequence, on explicit caches: the
attention's latents, the short convolution's last inputs, and the last N-1
canonical ids, which the next n-grams begin with. Each sequence of the batch is
one document. Every function here can be jitted, with `hashing` and
`compression` as static arguments.

`prefill` is one function of three: `look_up`, where rows come from tables, and
`begin` and `finish`, the model before and after it needs them. `decoders.py`
compiles these apart.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from engram_jax.backbone.transformer import Begun, ModelCache, Transformer
from engram_jax.errors import require, require_in_range
from engram_jax.memory.compression import TokenCompression
from engram_jax.memory.hashing import NgramHash
from engram_jax.memory.lookup import Tables, lookup_rows, require_tables
from engram_jax.types import History, Rows, TokenIds


class DecodeState(NamedTuple):
  """Everything that decoding keeps of the past.

  Attributes:
    cache: the model's.
    history: int32 [B, N-1], the last canonical ids; of NumPy where they are
      hashed on the host. None when the model has no memory, or it is turned
      off.
  """

  cache: ModelCache
  history: History | None


def init_state(
  model: Transformer,
  hashing: NgramHash | None,
  *,
  batch: int,
  capacity: int,
) -> DecodeState:
  """The state before the first token.

  Args:
    model: the transformer.
    hashing: its hash; None for a model without memory, or to turn the memory
      off.
    batch: B.
    capacity: most tokens of one sequence, padding of prompts left out.

  Raises:
    InputError: a size below 1, or a hash of another model.
  """
  require(batch >= 1, "batch", batch, "an integer >= 1")
  require(capacity >= 1, "capacity", capacity, "an integer >= 1")
  memory, history = model.config.engram, None
  if hashing is not None:
    expected = set() if memory is None else set(memory.layers)
    valid = f"those of the model's Engram layers, {sorted(expected)}"
    ok = set(hashing.layers) == expected
    require(ok, "hashing.layers", hashing.layers, valid)
    history = hashing.empty_history(batch)
  return DecodeState(model.init_cache(batch, capacity), history)


def prefill(
  model: Transformer,
  tables: Tables | None,
  hashing: NgramHash | None,
  compression: TokenCompression | None,
  state: DecodeState,
  token_ids: TokenIds,
  lengths: Int[Array, "B"],
) -> tuple[Float[Array, "B V"], DecodeState]:
  """Appends L tokens to each sequence, of which `lengths` are real.

  Args:
    model: the transformer.
    tables: [R, d] per Engram layer; None with `hashing` None.
    hashing: as given to `init_state`.
    compression: token ids to the hash's canonical ids; None with `hashing`
      None.
    state: from `init_state`, or from an earlier call, which is continued.
    token_ids: int32 [B, L]; any ids may pad on the right.
    lengths: int32 [B], 1 to L.

  Returns:
    float32 [B, V], logits after each sequence's last real token, and the state
    with the real tokens.

  Raises:
    InputError: another batch than the state's; hash, compression and state
      that do not belong together; a length outside 1..L, or more tokens than
      the capacity (these two outside jit only: whoever
      compiles the call checks them first, as `generate` does).
  """
  check_chunk(state, token_ids, lengths)
  check_state(hashing, compression, state)
  rows, history = look_up(
    tables, hashing, compression, state.history, token_ids, lengths
  )
  begun, cache = begin(model, state.cache, token_ids)
  logits, cache = finish(model, begun, cache, rows, lengths)
  return logits, DecodeState(cache, history)


def look_up(
  tables: Tables | None,
  hashing: NgramHash | None,
  compression: TokenCompression | None,
  history: History | None,
  token_ids: TokenIds,
  lengths: Int[Array, "B"],
) -> tuple[dict[int, Rows] | None, History | None]:
  """The part of `prefill` that needs no model: rows, and the history after.

  Both are None with `hashing` None.
  """
  if hashing is None:
    return None, None
  canonical = compression(token_ids)
  require_tables(tables or {}, hashing.num_rows)
  row_ids = hashing.hash(canonical, history=history)
  rows = lookup_rows(tables, row_ids).rows
  return rows, hashing.next_history(canonical, history=history, lengths=lengths)


def begin(
  model: Transformer, cache: ModelCache, token_ids: TokenIds
) -> tuple[Begun, ModelCache]:
  """The part of `prefill` that needs no rows: below the first Engram layer.

  Returns:
    What `finish` goes on from, and the cache to give it.
  """
  dispatch = model.config.dropless_dispatch
  return model.begin(token_ids, cache=cache, dispatch=dispatch)


def finish(
  model: Transformer,
  begun: Begun,
  cache: ModelCache,
  rows: Mapping[int, Rows] | None,
  lengths: Int[Array, "B"],
) -> tuple[Float[Array, "B V"], ModelCache]:
  """The rest of `prefill`.

  Args:
    model: the transformer.
    begun: from `begin`.
    cache: from `begin`.
    rows: [B, L, K, d] per Engram layer; None turns the memory off.
    lengths: int32 [B], 1 to L.

  Returns:
    float32 [B, V], logits after each sequence's last real token, and the
    cache with the real tokens.
  """
  output = model.finish(
    begun,
    rows,
    cache=cache,
    lengths=lengths,
    dispatch=model.config.dropless_dispatch,
    logits_at=lengths - 1,
  )
  return output.logits[:, 0], output.cache


def decode_step(
  model: Transformer,
  tables: Tables | None,
  hashing: NgramHash | None,
  compression: TokenCompression | None,
  state: DecodeState,
  token_ids: Int[Array, "B"],
) -> tuple[Float[Array, "B V"], DecodeState]:
  """Appends one token to each sequence.

  Args:
    token_ids: int32 [B]; the other arguments as in `prefill`.

  Returns:
    float32 [B, V], logits of the next token, and the state.

  Raises:
    InputError: as in `prefill`.
  """
  lengths = jnp.ones(token_ids.shape, jnp.int32)
  return prefill(
    model, tables, hashing, compression, state, token_ids[:, None], lengths
  )


def check_state(
  hashing: NgramHash | None,
  compression: TokenCompression | None,
  state: DecodeState,
) -> None:
  """Refuses a state or a compression that is not the hash's."""
  if hashing is None:
    off = state.history is None
    require(off, "hashing", None, "the hash that `init_state` was given")
    return
  require(
    state.history is not None,
    "state.history",
    None,
    "int32 [B, N-1]: give `init_state` the hash too",
  )
  size = None if compression is None else compression.size
  require(
    size == hashing.vocab_size,
    "compression.size",
    size,
    f"the hash's vocab_size, {hashing.vocab_size}",
  )


def check_chunk(
  state: DecodeState,
  token_ids: TokenIds | np.ndarray,
  lengths: Int[Array | np.ndarray, "B"],
) -> None:
  """Refuses tokens of another batch than the state's, lengths outside 1..L.

  And more tokens than the cache holds: it would drop them silently. Lengths
  that are known are looked at; see `prefill`.
  """
  held = state.cache.lengths
  shape = (token_ids.shape[:1], lengths.shape)
  valid = f"the state's batch, {held.shape}, twice"
  ok = shape == (held.shape, held.shape)
  require(ok, "batch of tokens, lengths", shape, valid)
  require_in_range("lengths", lengths, low=1, high=token_ids.shape[1] + 1)
  capacity = state.cache.attention[0].latent.shape[1]
  total = held + lengths
  require_in_range("tokens in the cache", total, low=1, high=capacity + 1)
