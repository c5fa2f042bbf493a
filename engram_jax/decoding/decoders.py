"""The decoder: the same steps on explicit states, wherever their rows live.

  lower_blocks   embedding, blocks below the first Engram layer       device
  upper_blocks   the rest of the model, with the rows                 device

The rows of a store on the device (`ProgramStore`) are hashed and read by a
program before these two. Those of any other store are hashed and read on the
host, and sent, while the device is at the lower blocks. All stores run the same
two programs on the same numbers, so that they agree to the bit: one program for
all would be rounded otherwise.

`start` is called as soon as the tokens are known and gives what ends the step,
so that the caller has its hands free while rows are fetched. A state is taken
over: its memory is the next one's.
"""

import concurrent.futures
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from engram_jax.backbone.transformer import Transformer
from engram_jax.decoding.forward import lower_blocks, upper_blocks
from engram_jax.decoding.state import (
  DecodeState,
  check_chunk,
  check_history,
  init_state,
  require_memory,
)
from engram_jax.decoding.weights import DecodingModel, for_decoding
from engram_jax.errors import require, require_in_range
from engram_jax.memory.hashing import NON_TEXT_ID
from engram_jax.memory.memory import Memory
from engram_jax.stores.prefetch import (
  Prefetcher,
  read_to_device,
  require_rows,
  row_ids_on_host,
)
from engram_jax.stores.program_stores import ProgramStore
from engram_jax.stores.store import OwnBuffers, PackedRows, RowStore, unpack
from engram_jax.types import History, Rows, TokenIds

#: float32 [B, V], logits after each sequence's last token, and the state.
Decoded = tuple[Float[Array, "B V"], DecodeState]


def lookup_chunk(
  store: ProgramStore,
  memory: Memory,
  history: History,
  token_ids: TokenIds,
  lengths: Int[Array, "B"],
) -> tuple[dict[int, Rows], History]:
  """The rows of a chunk from a store on the device, and the history after.

  Args:
    store: store of the memory's rows.
    memory: static under jit.
    history: int32 [B, N-1], the last canonical ids.
    token_ids: int32 [B, L], padded on the right.
    lengths: int32 [B], 1 to L.

  Returns:
    [B, L, K, d] per Engram layer, and int32 [B, N-1].
  """
  hashing, canonical = memory.hashing, memory.compression(token_ids)
  row_ids = memory.address(hashing.hash(canonical, history=history))
  rows = unpack(store.read(row_ids), store.row_format)
  return rows, hashing.next_history(canonical, history=history, lengths=lengths)


# By the memory's value: a later call with an equal one compiles nothing.
_lookup_chunk = jax.jit(lookup_chunk, static_argnames="memory")
_unpack = jax.jit(unpack, static_argnames="row_format")
# The cache is given up to its successor.
_lower_blocks = jax.jit(lower_blocks, donate_argnames="cache")
_upper_blocks = jax.jit(upper_blocks, donate_argnames="cache")


class Decoder:
  """A model, its memory, and the store of its rows.

  Use it as a context, or `close` it: what reads ahead of the model ends then.

  Args:
    model: the transformer, or what `for_decoding` made of it.
    memory: the model's; None without one, or to turn it off.
    store: where the rows live; None with `memory` None.
    prefetch: hash and read on a thread while the device is at the lower blocks;
      otherwise before that, one after the other: the same rows. Of no use to a
      store on the device.

  Raises:
    InputError: a memory without a store or a store without a memory, either of
      another model, or a store of other rows than the memory's.
  """

  def __init__(
    self,
    model: Transformer | DecodingModel,
    memory: Memory | None,
    store: RowStore | None,
    *,
    prefetch: bool = True,
  ):
    found = "None" if store is None else type(store).__name__
    valid = "a store with a memory, and None without one"
    require((store is None) == (memory is None), "store", found, valid)
    self.model, self.memory, self.store = for_decoding(model), memory, store
    self._own, self._prefetcher = OwnBuffers(), None
    if memory is None:
      return
    require_memory(self.model, memory)
    require_rows(store, memory.hashing)
    if prefetch and not isinstance(store, ProgramStore):
      self._prefetcher = Prefetcher(store)

  def close(self) -> None:
    """Ends the threads; see `Prefetcher.close`."""
    if self._prefetcher is not None:
      self._prefetcher.close()

  def __enter__(self) -> "Decoder":
    return self

  def __exit__(self, *exception: Any) -> None:
    self.close()

  def init_state(self, batch: int, capacity: int) -> DecodeState:
    """The state before the first token; see `state.init_state`.

    Args:
      batch: B, number of sequences.
      capacity: most tokens of one sequence, prompt included.
    """
    state = init_state(self.model, self.memory, batch=batch, capacity=capacity)
    if self.memory is None or isinstance(self.store, ProgramStore):
      return state
    return state._replace(history=np.asarray(state.history))

  def start(
    self,
    state: DecodeState,
    token_ids: Any,
    lengths: Any = None,
    *,
    lookup: Callable[[], tuple[dict[int, Rows] | None, Any]] | None = None,
  ) -> Callable[[], Decoded]:
    """Begins to append tokens to each sequence.

    Args:
      state: given up, also if the step fails.
      token_ids: int32 [B, L], padded on the right with any ids; or [B], one
        token each.
      lengths: int32 [B], how many of L are real; None with [B].
      lookup: gives the rows, [B, L, K, d] per Engram layer, and the history
        after these tokens, for whoever has read them; None to read them here.

    Returns:
      A function that ends the step; to be called once. What the store raises
      comes then.

    Raises:
      InputError: another batch than the state's, a state of another use of the
        memory, an id outside the vocabulary, a length outside 1..L, or more
        tokens than the capacity.
    """
    token_ids, lengths = self._as_chunk(state, token_ids, lengths)
    check_history(self.memory, state)
    if lookup is None:
      lookup = self._start_lookup(state.history, token_ids, lengths)
    streams, cache = _lower_blocks(
      self.model, state.cache, jnp.asarray(token_ids)
    )

    def end() -> Decoded:
      rows, history = lookup()
      logits, new_cache = _upper_blocks(
        self.model, streams, cache, rows, jnp.asarray(lengths)
      )
      return logits, DecodeState(new_cache, history)

    return end

  def _as_chunk(
    self, state: DecodeState, token_ids: Any, lengths: Any
  ) -> tuple[np.ndarray, np.ndarray]:
    """int32 [B, L] and [B] on the host, checked; 0 for the padding.

    In memory of its own: the caller may write to its arrays again.
    """
    # As they come: a smaller dtype would make other ids of some.
    token_ids = np.asarray(token_ids)
    if lengths is None:
      token_ids = token_ids[:, None]
      lengths = np.ones(len(token_ids), np.int32)
    lengths = np.asarray(lengths)
    check_chunk(state, token_ids, lengths)
    found, valid = f"dtype {token_ids.dtype}", "integers"
    require(token_ids.dtype.kind in "iu", "token_ids", found, valid)
    is_real = np.arange(token_ids.shape[1]) < lengths[:, None]
    # The model may have more ids than its tokenizer has tokens.
    known = self.model.config if self.memory is None else self.memory
    real = token_ids[is_real]
    require_in_range("token_ids", real, low=0, high=known.vocab_size)
    return np.where(is_real, token_ids, 0).astype(np.int32), lengths

  def _start_lookup(
    self, history: Any, token_ids: np.ndarray, lengths: np.ndarray
  ) -> Callable[[], tuple[dict[int, Rows] | None, Any]]:
    """What gives the rows of the chunk, and the history after it."""
    if self.memory is None:
      return lambda: (None, None)
    if isinstance(self.store, ProgramStore):
      found = _lookup_chunk(
        self.store,
        self.memory,
        jnp.asarray(history),
        jnp.asarray(token_ids),
        jnp.asarray(lengths),
      )
      return lambda: found
    history = np.asarray(history)
    is_real = np.arange(token_ids.shape[1]) < lengths[:, None]
    # Padding is no text: its rows, which nobody uses, are always the same.
    canonical = self.memory.compression(token_ids)
    canonical = np.where(is_real, canonical, NON_TEXT_ID)
    packed = self._start_reading(canonical, history)
    after = last_ids(canonical, history, lengths)
    row_format = self.store.row_format
    return lambda: (_unpack(packed(), row_format=row_format), after)

  def _start_reading(
    self, canonical: np.ndarray, history: np.ndarray
  ) -> Callable[[], PackedRows]:
    def row_ids():
      hashing = self.memory.hashing
      found = row_ids_on_host(hashing, canonical, history=history)
      return self.memory.address(found)

    if self._prefetcher is not None:
      return self._prefetcher.submit(row_ids).result
    rows = concurrent.futures.Future()
    try:
      buffers = self._own.buffers
      found = read_to_device(self.store, row_ids(), buffers=buffers)
      rows.set_result(found)
    except Exception as error:  # raised where a thread's would be
      rows.set_exception(error)
    return rows.result


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
