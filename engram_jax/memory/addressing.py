"""Which rows are read, of those that the hash names: all, or a control's.

The controls say what the memory is worth: the rows of an Engram layer that
cannot tell one text from another (`one_row`), or that tell of another place
(`shuffled`), at the same compute. See `EngramConfig.addressing`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.errors import require
from engram_jax.memory.hashing import NgramHash
from engram_jax.memory.lookup import shuffle_row_ids

#: Seed of `shuffled`. One of its own, so that an evaluation that shuffles
#: again does not undo it.
_SEED = 1


def address(
  row_ids: Mapping[int, Any], addressing: str, hashing: NgramHash
) -> dict[int, Any]:
  """The rows that each position reads.

  Args:
    row_ids: [B, L, K] per Engram layer, of the hash; JAX's or NumPy's.
    addressing: one of `config.ADDRESSINGS`.
    hashing: the hash they are of.

  Returns:
    [B, L, K] per Engram layer, of the same kind.

  Raises:
    InputError: `shuffled` rows of a single position.
  """
  if addressing == "ngrams":
    return dict(row_ids)
  if addressing == "shuffled":
    return shuffle_row_ids(jax.random.key(_SEED), row_ids)
  return {
    layer: (np if isinstance(ids, np.ndarray) else jnp).zeros_like(ids)
    + hashing.head_offsets(layer).astype(ids.dtype)
    for layer, ids in row_ids.items()
  }


def require_by_token(addressing: str) -> None:
  """Refuses an addressing that decoding cannot do, token by token.

  Args:
    addressing: one of `config.ADDRESSINGS`.
  """
  valid = (
    "ngrams or one_row to decode: shuffled rows are those of a whole batch"
  )
  require(addressing != "shuffled", "addressing", addressing, valid)
