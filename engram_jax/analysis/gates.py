"""The gates of one text: how far each token lets the memory in.

alpha_l [L, G]: the gates of Engram layer l (Eq. 4), per position and stream
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from engram_jax.backbone.transformer import Transformer
from engram_jax.decoding.text import TextStream
from engram_jax.errors import require, require_finite, require_in_range
from engram_jax.memory.breaks import require_integers
from engram_jax.memory.lookup import Tables
from engram_jax.memory.memory import Memory
from engram_jax.stores.store import RowStore


def gate_map(
  model: Transformer,
  memory: Memory,
  store: Tables | RowStore,
  token_ids: Int[np.ndarray, "L"] | Int[Array, "L"],
) -> dict[int, Float[np.ndarray, "L G"]]:
  """Runs one text through the model and returns its gates.

  The text is one document. No expert drops a token, so that the gates do not
  depend on the model's capacity factor.

  Args:
    model: with a memory.
    memory: the model's.
    store: where its rows live: a store, or tables [R, d] per Engram layer.
    token_ids: [L], raw ids, at least one.

  Returns:
    Per Engram layer float32 [L, G], between 0 and 1.

  Raises:
    InputError: a model without memory, no tokens, ids outside the vocabulary,
      or a store of another memory.
    NonFiniteError: a gate is not finite; the message has layer, position and
      stream.
  """
  engram = model.config.engram
  require(engram is not None, "model.config.engram", None, "a memory")
  require(token_ids.size > 0, "token_ids", "no tokens", "one or more tokens")
  require_integers("token_ids", token_ids)
  # Before int32 cuts larger ones off.
  high = memory.vocab_size
  require_in_range("token_ids", token_ids, low=0, high=high)
  ids = jnp.asarray(token_ids, jnp.int32)[None]
  rows = memory.lookup(store, ids).rows
  gates = jax.device_get(_gates(model, ids, rows))
  for layer, gate in gates.items():
    require_finite(f"gates of layer {layer}", gate[0])
  return {layer: gate[0] for layer, gate in gates.items()}


@nnx.jit
def _gates(model, token_ids, rows):
  dispatch = model.config.exact_dispatch
  return model(token_ids, rows, dispatch=dispatch).gates


def token_texts(
  tokenizer: Any, token_ids: Sequence[int] | Int[np.ndarray, "n"]
) -> list[str]:
  """What each token adds to the text; joined, the pieces are the text.

  A token that ends within a character adds nothing: the token that completes
  the character has all of it. Special tokens are no text.

  Args:
    tokenizer: a byte-level BPE `tokenizers.Tokenizer`.
    token_ids: raw ids.

  Raises:
    InputError: an id that the tokenizer has no token for.
  """
  stream = TextStream(tokenizer)
  texts = [stream.push([int(token_id)]) for token_id in token_ids]
  if texts:
    texts[-1] += stream.close()
  return texts
