"""Drafters: what guesses the next tokens of a text for `speculate`.

  prompt_lookup   what followed the text's last n-gram where it stood before
  corpus_drafter  what mostly followed it in other texts: an n-gram model
  table_drafter   what its rows in the memory say, without the backbone
  first_of        the first of several that has a draft

The table's draft is LogitLens on what the Engram layers add: with v_t = W_V e_t
and the gate left out (after a norm only its share between layers would count),

  logits = RMSNorm(sum over the layers of v_t) W^T.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from engram_jax.backbone.transformer import Transformer
from engram_jax.decoding.speculation import Drafter, DraftRows
from engram_jax.decoding.weights import DecodingModel
from engram_jax.errors import require, require_integer
from engram_jax.memory.ngrams import number_tuples
from engram_jax.types import Rows

#: Per Engram layer [M, D]: what makes a hidden state of its rows.
Lens = Mapping[int, Float[Array | np.ndarray, "M D"]]


def prompt_lookup(
  text: Sequence[int],
  limit: int,
  rows: DraftRows | None = None,
  *,
  longest: int = 3,
  shortest: int = 1,
) -> list[int]:
  """What followed the text's last n-gram where it stood last before.

  An n-gram cache of the text itself; of several lengths the longest n-gram that
  is found counts. Bind the options with `functools.partial`.

  Args:
    text: token ids so far.
    limit: most tokens of the draft.
    rows: unused.
    longest: tokens of the longest n-gram that is looked for.
    shortest: tokens of the shortest, at least 1.

  Returns:
    At most `limit` tokens; none if no such n-gram stood in the text before.

  Raises:
    InputError: `shortest` below 1, or above `longest`.
  """
  del rows
  require_integer("shortest", shortest, low=1)
  require_integer("longest", longest)
  valid = f"at least shortest, {shortest}"
  require(longest >= shortest, "longest", longest, valid)
  tokens = np.asarray(text)
  for order in range(min(longest, len(tokens) - 1), shortest - 1, -1):
    # The last window is the n-gram itself.
    windows = np.lib.stride_tricks.sliding_window_view(tokens[:-1], order)
    found = np.flatnonzero((windows == tokens[-order:]).all(axis=1))
    if len(found):
      start = found[-1] + order
      return tokens[start : start + limit].tolist()
  return []


def corpus_drafter(
  texts: Int[np.ndarray, "n L"], *, longest: int = 3
) -> Drafter:
  """A drafter by an n-gram cache of other texts, such as the training text's.

  After each n-gram it takes what mostly followed there (of equals the smallest
  id); of several lengths the longest n-gram that was met counts.

  Args:
    texts: token ids; no n-gram reaches from one row to the next.
    longest: tokens of the longest n-gram.

  Raises:
    InputError: `longest` below 1, or not below L.
  """
  valid = f"1 to {texts.shape[1] - 1}: an n-gram and what follows fit into L"
  require(1 <= longest < texts.shape[1], "longest", longest, valid)
  followers: dict[tuple[int, ...], int] = {}
  for order in range(1, longest + 1):
    windows = np.lib.stride_tricks.sliding_window_view(
      texts, order + 1, axis=1
    ).reshape(-1, order + 1)
    # Each distinct n-gram with each follower once, and how often.
    numbers = number_tuples([*windows.T])
    _, first, counts = np.unique(numbers, return_index=True, return_counts=True)
    found = windows[first]
    contexts = number_tuples([*found[:, :-1].T])
    best = np.lexsort((found[:, -1], -counts, contexts))
    is_first = np.diff(contexts[best], prepend=-1) != 0
    for *context, follower in found[best[is_first]].tolist():
      followers[tuple(context)] = follower

  def draft(
    text: Sequence[int], limit: int, rows: DraftRows | None
  ) -> list[int]:
    del rows
    tokens = list(text[-longest:])
    start = len(tokens)
    for _ in range(limit):
      contexts = (tuple(tokens[-n:]) for n in range(longest, 0, -1))
      found = (followers[c] for c in contexts if c in followers)
      token = next(found, None)
      if token is None:
        break
      tokens.append(token)
    return tokens[start:]

  return draft


def memory_logits(
  model: Transformer, rows: Mapping[int, Rows], lens: Lens | None = None
) -> Float[Array, "B L V"]:
  """Logits of the next token by the rows alone; see the top of this module.

  Args:
    model: whose value projections, final norm and output matrix are used.
    rows: [B, L, K, d] per Engram layer.
    lens: in place of the value projections, e.g. a fit of the last hidden
      state to the rows; a layer that it leaves out adds nothing.

  Returns:
    float32 [B, L, V]; equal ones for rows of zeros.

  Raises:
    InputError: a lens of no layer of the model's; no lens for OverEncoding,
      whose vectors are parts of an input, not values.
  """
  layers, fusion = model.config.engram.layers, model.config.engram.fusion
  valid = "gated, or a lens"
  require(lens is not None or fusion == "gated", "engram.fusion", fusion, valid)
  ok = lens is None or set(lens) & set(layers)
  require(ok, "lens", f"layers {list(lens or ())}", f"one of {list(layers)}")
  total = None
  for layer, engram in zip(layers, model.engrams):
    if lens is not None and layer not in lens:
      continue
    found = rows[layer]
    entry = found.reshape(*found.shape[:2], -1).astype(jnp.float32)
    if lens is not None:
      value = entry @ jnp.asarray(lens[layer], jnp.float32)
    else:
      params = engram.params()
      value = entry @ params.projection[:, -1].astype(jnp.float32)
      if params.projection_bias is not None:
        value = value + params.projection_bias[-1]
    total = value if total is None else total + value
  return model.logits(model.norm(total.astype(model.config.dtype)))


@functools.partial(jax.jit, static_argnames="vocab_size")
def _likeliest(
  model: Transformer,
  rows: Mapping[int, Rows],
  lens: Lens | None,
  *,
  vocab_size: int,
) -> Int[Array, ""]:
  logits = memory_logits(model, rows, lens)
  return jnp.argmax(logits[0, -1, :vocab_size])


def table_drafter(
  model: Transformer | DecodingModel,
  *,
  vocab_size: int | None = None,
  lens: Lens | None = None,
) -> Drafter:
  """A drafter that takes the likeliest token by the rows, one after another.

  Each token of a draft waits for the rows of the one before. The model reads
  none of them again.

  Args:
    model: the transformer; its backbone is not used.
    vocab_size: ids from here on are never drafted; None for the model's.
    lens: see `memory_logits`.

  Raises:
    InputError: a model without a memory, or (when it drafts) rows that are
      None: a memory that was turned off.
  """
  outer = model.outer if isinstance(model, DecodingModel) else model
  memory = outer.config.engram
  require(memory is not None, "model.config.engram", None, "a memory")
  vocab_size = vocab_size or outer.config.vocab_size

  def draft(
    text: Sequence[int], limit: int, rows: DraftRows | None
  ) -> list[int]:
    require(rows is not None, "rows", None, "those of a memory that is on")
    tokens = [text[-1]]
    for _ in range(limit):
      found = rows.take(tokens)
      last = {layer: x[:, -1:] for layer, x in found.items()}
      best = _likeliest(outer, last, lens, vocab_size=vocab_size)
      tokens.append(int(best))
    return tokens[1:]

  return draft


def first_of(*drafters: Drafter) -> Drafter:
  """A drafter that asks others in turn, until one has a draft.

  Args:
    *drafters: in the order in which they are asked.
  """

  def draft(
    text: Sequence[int], limit: int, rows: DraftRows | None
  ) -> Sequence[int]:
    drafts = (drafter(text, limit, rows) for drafter in drafters)
    return next((found for found in drafts if found), [])

  return draft
