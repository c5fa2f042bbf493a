"""The state of decoding: what is kept of the past, before and after each step.

Beside the model's cache these are the last N-1 canonical ids, which the next
n-grams begin with.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Int

from engram_jax.decoding.forward import ModelCache, init_cache
from engram_jax.decoding.weights import DecodingModel
from engram_jax.errors import require, require_in_range
from engram_jax.memory.addressing import require_by_token
from engram_jax.memory.memory import Memory
from engram_jax.types import History, TokenIds


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
  model: DecodingModel, memory: Memory | None, *, batch: int, capacity: int
) -> DecodeState:
  """The state before the first token.

  Args:
    model: the transformer, from `for_decoding`.
    memory: its memory; None for a model without one, or to turn it off.
    batch: B.
    capacity: most tokens of one sequence, padding of prompts left out.

  Raises:
    InputError: a size below 1, or the memory of another model.
  """
  require(batch >= 1, "batch", batch, "an integer >= 1")
  require(capacity >= 1, "capacity", capacity, "an integer >= 1")
  history = None
  if memory is not None:
    require_memory(model, memory)
    history = memory.hashing.empty_history(batch)
  return DecodeState(init_cache(model, batch, capacity), history)


def require_memory(model: DecodingModel, memory: Memory) -> None:
  """Refuses a memory of other layers than the model's, or that no token reads.

  Args:
    model: the model to decode with.
    memory: the memory that it is to read.
  """
  engram = model.config.engram
  expected = set() if engram is None else set(engram.layers)
  valid = f"those of the model's Engram layers, {sorted(expected)}"
  layers = memory.hashing.layers
  require(set(layers) == expected, "memory.layers", layers, valid)
  require_by_token(memory.config.addressing)


def check_history(memory: Memory | None, state: DecodeState) -> None:
  """Refuses a state that was made with another use of the memory.

  Args:
    memory: the memory in use now; None for none.
    state: a state made by `init_state`.
  """
  if memory is None:
    off = state.history is None
    require(off, "memory", None, "the memory that `init_state` was given")
    return
  require(
    state.history is not None,
    "state.history",
    None,
    "int32 [B, N-1]: give `init_state` the memory too",
  )


def check_chunk(
  state: DecodeState,
  token_ids: TokenIds | np.ndarray,
  lengths: Int[Array | np.ndarray, "B"],
) -> None:
  """Refuses tokens of another batch than the state's, lengths outside 1..L.

  And more tokens than the cache holds: it would drop them silently. Lengths
  that are known are looked at; whoever compiles a step checks them first.

  Args:
    state: the state that the tokens continue.
    token_ids: int32 [B, L], the new tokens, padded at the end.
    lengths: int32 [B], number of real ones.
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
