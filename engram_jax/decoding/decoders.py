"""Decoders: the same steps on explicit states, whatever home their rows have.

  look_up     hash, read                              by a TableDecoder: device
  fetch       hash, read, send                        by a StoreDecoder: host
  begin       embedding, blocks below the first Engram layer          device
  finish      the rest of the model, with the rows                    device

A `StoreDecoder` fetches while the device is at `begin`. Both kinds run the same
two programs on the same numbers, so that they agree to the bit: one program for
all would be rounded otherwise.

`start` is called as soon as the tokens are known and gives what ends the step,
so that the caller has its hands free while rows are fetched. A state is taken
over: its memory is the next one's.
"""

import concurrent.futures
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from engram_jax.backbone.transformer import Transformer
from engram_jax.decoding.state import (
  DecodeState,
  begin,
  check_chunk,
  check_state,
  finish,
  init_state,
  look_up,
)
from engram_jax.decoding.weights import for_decoding
from engram_jax.memory.compression import TokenCompression
from engram_jax.memory.hashing import NO_TOKEN, NgramHash
from engram_jax.memory.prefetch import (
  Prefetcher,
  read_to_device,
  require_rows,
  row_ids_on_host,
)
from engram_jax.memory.lookup import Tables
from engram_jax.memory.stores import OwnBuffers, PackedRows, RowStore, unpack

#: float32 [B, V], logits after each sequence's last token, and the state.
Decoded = tuple[Float[Array, "B V"], DecodeState]

# Static by identity (hash) and by digest (compression): a later call with the
# same objects compiles nothing.
_look_up = jax.jit(look_up, static_argnames=("hashing", "compression"))
_unpack = jax.jit(unpack, static_argnames="row_format")
# The cache is given up to its successor.
_begin = jax.jit(begin, donate_argnames="cache")
_finish = jax.jit(finish, donate_argnames="cache")


@runtime_checkable
class Decoder(Protocol):
  """What `generate` asks of one."""

  def init_state(self, batch: int, capacity: int) -> DecodeState:
    """The state before the first token; see `state.init_state`."""
    ...

  def start(
    self, state: DecodeState, token_ids: Any, lengths: Any = None
  ) -> Callable[[], Decoded]:
    """Begins to append tokens to each sequence.

    Args:
      state: given up, also if the step fails.
      token_ids: int32 [B, L], padded on the right; or [B], one token each.
      lengths: int32 [B], how many of L are real; None with [B].

    Returns:
      A function that ends the step; to be called once.

    Raises:
      InputError: as `state.prefill`.
    """
    ...


class TableDecoder:
  """Reads its rows from tables on the device.

  Args:
    model: the transformer.
    tables: [R, d] per Engram layer; None with `hashing` None.
    hashing: None without a memory, or to turn it off.
    compression: None with `hashing` None.
  """

  def __init__(
    self,
    model: Transformer,
    tables: Tables | None,
    hashing: NgramHash | None,
    compression: TokenCompression | None,
  ):
    self._model, self._hashing = for_decoding(model), hashing
    self._memory = (tables, hashing, compression)

  def init_state(self, batch: int, capacity: int) -> DecodeState:
    """See `Decoder`."""
    return init_state(
      self._model, self._hashing, batch=batch, capacity=capacity
    )

  def start(
    self, state: DecodeState, token_ids: Any, lengths: Any = None
  ) -> Callable[[], Decoded]:
    """See `Decoder`."""
    token_ids, lengths = _as_chunk(state, token_ids, lengths)
    check_state(self._hashing, self._memory[2], state)
    token_ids, lengths = jnp.asarray(token_ids), jnp.asarray(lengths)
    rows, history = _look_up(*self._memory, state.history, token_ids, lengths)
    begun, cache = _begin(self._model, state.cache, token_ids)
    logits, cache = _finish(self._model, begun, cache, rows, lengths)
    return lambda: (logits, DecodeState(cache, history))


class StoreDecoder:
  """Reads its rows from a store, between the two programs of a step.

  Args:
    model: the transformer, with a memory.
    rows: a `Prefetcher`, whose thread hashes and reads while the device is at
      the first program; or a store, which is read before that: the same rows,
      one after the other.
    hashing: the model's.
    compression: raw to canonical ids.

  Raises:
    InputError: a store of other rows than the hash's.
  """

  def __init__(
    self,
    model: Transformer,
    rows: Prefetcher | RowStore,
    hashing: NgramHash,
    compression: TokenCompression,
  ):
    self._model, self._rows = for_decoding(model), rows
    self._hashing, self._compression = hashing, compression
    self._own = OwnBuffers()
    store = rows.store if isinstance(rows, Prefetcher) else rows
    require_rows(store, hashing)
    self._row_format = store.row_format

  def init_state(self, batch: int, capacity: int) -> DecodeState:
    """See `Decoder`; the history is NumPy's."""
    state = init_state(
      self._model, self._hashing, batch=batch, capacity=capacity
    )
    return state._replace(history=np.asarray(state.history))

  def start(
    self, state: DecodeState, token_ids: Any, lengths: Any = None
  ) -> Callable[[], Decoded]:
    """See `Decoder`. What the store raises comes when the step is ended."""
    token_ids, lengths = _as_chunk(state, token_ids, lengths)
    check_state(self._hashing, self._compression, state)
    history = np.asarray(state.history)
    tokens = np.asarray(token_ids)
    is_real = np.arange(tokens.shape[1]) < lengths[:, None]
    # Padding is no text, and any id: its rows, which nobody uses, are always
    # the same.
    canonical = self._compression(np.where(is_real, tokens, 0))
    canonical = np.where(is_real, canonical, NO_TOKEN)
    rows_of = self._start_reading(canonical, history)
    begun, cache = _begin(self._model, state.cache, jnp.asarray(token_ids))
    after = last_ids(canonical, history, lengths)

    def end() -> Decoded:
      rows = _unpack(rows_of(), row_format=self._row_format)
      logits, new_cache = _finish(
        self._model, begun, cache, rows, jnp.asarray(lengths)
      )
      return logits, DecodeState(new_cache, after)

    return end

  def _start_reading(
    self, canonical: np.ndarray, history: np.ndarray
  ) -> Callable[[], PackedRows]:
    def row_ids():
      return row_ids_on_host(self._hashing, canonical, history=history)

    if isinstance(self._rows, Prefetcher):
      return self._rows.fetch(row_ids).result
    rows = concurrent.futures.Future()
    try:
      buffers = self._own.buffers
      found = read_to_device(self._rows, row_ids(), buffers=buffers)
      rows.set_result(found)
    except Exception as error:  # raised where a thread's would be
      rows.set_exception(error)
    return rows.result


def _as_chunk(
  state: DecodeState, token_ids: Any, lengths: Any
) -> tuple[Any, np.ndarray]:
  """[B, L] and on the host [B], also of one token each, [B]; checked."""
  if isinstance(token_ids, np.ndarray):
    # A step may be under way when the caller writes to it again.
    token_ids = token_ids.copy()
  if lengths is None:
    token_ids = token_ids[:, None]
    lengths = np.ones(len(token_ids), np.int32)
  lengths = np.asarray(lengths)
  check_chunk(state, token_ids, lengths)
  return token_ids, lengths


def last_ids(
  canonical: np.ndarray, history: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
  """The history after these tokens, on the host: their last N-1 ids.

  What of it is out of reach (behind a position without text) the hash finds
  itself; `NgramHash.next_history` strikes it out already.

  Args:
    canonical: int32 [B, L].
    history: int32 [B, N-1], the ids before.
    lengths: int32 [B], how many of L are real.
  """
  joined = np.concatenate([history, canonical], axis=1)
  places = lengths[:, None] + np.arange(history.shape[1])
  return np.take_along_axis(joined, places, axis=1).astype(np.int32)
