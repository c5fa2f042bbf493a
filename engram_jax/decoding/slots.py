"""Slots: a batch in which a finished sequence makes room for the next prompt.

A slot is one place of the batch. Its caches, history and length are the entry
`slot` of every array of a state, so that a freshly prefilled sequence moves in
by overwriting them.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from engram_jax.decoding.state import DecodeState

Tree = TypeVar("Tree")


def insert(state: Tree, fresh: Tree, slot: Int[Array, ""] | int) -> Tree:
  """A batch with one sequence in place of what a slot held; can be jitted.

  Args:
    state: a `DecodeState`, or any tree of arrays [B, ...].
    fresh: the same of a batch of one, of the same capacity.
    slot: 0 <= slot < B.

  Returns:
    The state; other slots are as they were.
  """
  return jax.tree.map(
    lambda old, new: jax.lax.dynamic_update_slice_in_dim(
      old, new.astype(old.dtype), slot, axis=0
    ),
    state,
    fresh,
  )


def rewind(
  state: DecodeState, slots: Bool[Array | np.ndarray, "B"]
) -> DecodeState:
  """Sends slots back to the start, whose sequences nobody reads any more.

  They may go on as part of the batch without ever filling their cache.

  Args:
    state: the state of B slots.
    slots: bool [B], True for the slots to send back.
  """
  lengths = jnp.where(slots, 0, state.cache.lengths)
  return state._replace(cache=state.cache._replace(lengths=lengths))
