"""Speculative greedy decoding: guess tokens, verify them in one forward pass.

  text  ... t0   a draft d1 ... dk for what may follow
  model    [t0 d1 ... dk]  -> its own choice after each of the k + 1 tokens

The drafts that equal the model's choices stay, up to the first that does not;
the choice after the last of them is the next token. So the text is that of
`generate` at temperature 0, whatever the drafter: it decides how many passes
that takes. Caches and history are those of the tokens that stay.

One chunk of k + 1 tokens and k + 1 chunks of one round differently, in the last
bits. Two choices whose logits lie closer together than `margin` are therefore
left undecided by a chunk, and decided by the step of one token that `generate`
takes; of equal logits both take the smallest id. What remains is a tie so close
that the bits of the cache decide it.

Rows of a draft are read once: those that a drafter has looked at are the ones
that the model gets, and those of a token that stays undecided are kept for its
step (`DraftRows`).
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from engram_jax.backbone.transformer import Transformer
from engram_jax.decoding.decoders import Decoder, last_ids
from engram_jax.decoding.forward import (
  ModelCache,
  lower_blocks,
  verify_blocks,
)
from engram_jax.decoding.generate import (
  describe_nonfinite,
  ids_to_draw,
  pad_prompts,
  rounded_length,
)
from engram_jax.decoding.room import require_room
from engram_jax.decoding.sampling import finite_logits
from engram_jax.decoding.state import DecodeState
from engram_jax.decoding.weights import DecodingModel
from engram_jax.errors import NonFiniteError, require, require_integer
from engram_jax.memory.memory import Memory
from engram_jax.stores.prefetch import read_to_device
from engram_jax.stores.store import RowStore, unpack
from engram_jax.types import Hidden, Rows

_unpack = jax.jit(unpack, static_argnames="row_format")
_lower_blocks = jax.jit(lower_blocks, donate_argnames="cache")


class DraftRows:
  """Rows of the text's last token and of those drafted after it, read once.

  Args:
    memory: the model's.
    store: where its rows live.
    history: int32 [1, N-1], the canonical ids before the last token.
  """

  def __init__(
    self, memory: Memory, store: RowStore, history: Int[np.ndarray, "1 history"]
  ):
    self._memory, self._store = memory, store
    self.history = history
    self._tokens: list[int] = []
    self._rows: dict[int, Rows] = {}

  def take(self, tokens: Sequence[int]) -> dict[int, Rows]:
    """Rows [1, L, K, d] per Engram layer of these L tokens.

    Of those that the call before named, in the same order, nothing is read.

    Args:
      tokens: the text's last token, and what is drafted after it.
    """
    held = 0
    for old, new in zip(self._tokens, tokens):
      if old != new:
        break
      held += 1
    if held < len(tokens):
      rows = {layer: x[:, :held] for layer, x in self._rows.items()}
      row_ids = self._memory.row_ids_numpy(
        np.array([tokens], np.int32), history=self.history
      )
      new_ids = {layer: ids[:, held:] for layer, ids in row_ids.items()}
      packed = read_to_device(self._store, new_ids)
      found = _unpack(packed, row_format=self._store.row_format)
      join = functools.partial(jnp.concatenate, axis=1)
      rows = {i: join([rows[i], x]) if held else x for i, x in found.items()}
      self._tokens, self._rows = list(tokens), rows
    return {i: x[:, : len(tokens)] for i, x in self._rows.items()}

  def advance(self, tokens: Sequence[int]) -> None:
    """Goes on to what follows these tokens; the rows of others are kept.

    Args:
      tokens: what the text's last token and drafts were, as far as they stay.
    """
    canonical = self._memory.compression(np.array([tokens], np.int32))
    lengths = np.array([len(tokens)])
    self.history = last_ids(canonical, self.history, lengths)
    # What was taken begins with them: `take` came before.
    self._tokens = self._tokens[len(tokens) :]
    self._rows = {i: x[:, len(tokens) :] for i, x in self._rows.items()}


@runtime_checkable
class Drafter(Protocol):
  """What guesses the tokens after a text; see `drafters.py`."""

  def __call__(
    self, text: Sequence[int], limit: int, rows: DraftRows | None
  ) -> Sequence[int]:
    """At most `limit` tokens that may follow, in order; none if it has none.

    Args:
      text: token ids so far, prompt included.
      limit: most tokens that are of use, at least 1.
      rows: the rows of the text's last token and of drafts; None without a
        memory.
    """
    ...


class Pass(NamedTuple):
  """What one forward pass of `speculate` gave.

  Attributes:
    tokens: the new tokens, `end_id` included; none after a pass that left the
      first of them undecided.
    drafted: number of tokens that it verified.
    accepted: how many of them the model chose as well.
  """

  tokens: tuple[int, ...]
  drafted: int
  accepted: int


def rounding_margin(dtype: Any) -> float:
  """A difference of logits above what two programs' rounding makes of one.

  Args:
    dtype: compute dtype of the model.

  Returns:
    The square root of the dtype's epsilon: 0.0003 in float32, 0.09 in bfloat16.
  """
  return float(jnp.finfo(dtype).eps) ** 0.5


def speculate(
  model: Transformer | DecodingModel,
  memory: Memory | None,
  store: RowStore | None,
  prompt: Sequence[int],
  *,
  drafter: Drafter,
  draft_length: int,
  max_new_tokens: int,
  end_id: int | None = None,
  vocab_size: int | None = None,
  pad_id: int | None = None,
  margin: float | None = None,
) -> Iterator[Pass]:
  """Continues a prompt with the likeliest tokens, several in a pass.

  The text is that of `generate` at temperature 0; see the top of this module.

  Args:
    model: the transformer, or what `for_decoding` made of it.
    memory: as in `generate`.
    store: as in `generate`.
    prompt: token ids, at least one.
    drafter: guesses what follows.
    draft_length: k, most tokens that a pass verifies, at least 1; those of a
      shorter draft are padded, so that there is one program for all.
    max_new_tokens: as in `generate`.
    end_id: as in `generate`.
    vocab_size: as in `generate`.
    pad_id: as in `generate`.
    margin: least distance of the two best logits that a pass of several tokens
      decides by, at least 0; None for `rounding_margin` of the model's dtype.

  Returns:
    An iterator of `Pass`; the first is the prompt's. Bad arguments are refused
    at the call, not at its first pass.

  Raises:
    InputError: what `generate` refuses; a draft length below 1 or a negative
      margin; at the pass that verifies it, a draft that is too long or has an
      id outside the vocabulary.
    NonFiniteError: at the pass whose logits are not finite.
  """
  allowed, vocab_size = ids_to_draw(
    model, memory, vocab_size=vocab_size, pad_id=pad_id, end_id=end_id
  )
  require_integer("max_new_tokens", max_new_tokens, low=1)
  require_integer("draft_length", draft_length, low=1)
  if margin is None:
    margin = rounding_margin(model.config.dtype)
  require(margin >= 0, "margin", margin, "a number >= 0, or None")
  chunk = pad_prompts([prompt], vocab_size=vocab_size)
  capacity = rounded_length(len(prompt) + max_new_tokens)
  require_room(
    model,
    slots=1,
    prompt=chunk[0].shape[1],
    capacity=capacity,
    max_new_tokens=max_new_tokens,
  )
  # What it reads ahead would be rows that are held already.
  decoder = Decoder(model, memory, store, prefetch=False)

  def choose(logits: Float[Array, "1 V"], text: list[int]) -> int:
    best, finite = jax.device_get(_choose(logits, allowed))
    if not finite:
      new = len(text) - len(prompt)
      raise NonFiniteError(
        f"the logits of the prompt at new token {new} are not finite: "
        + describe_nonfinite(model, store)
      )
    return int(best)

  def passes() -> Iterator[Pass]:
    text = list(prompt)
    state = decoder.init_state(1, capacity)
    logits, state = decoder.start(state, *chunk)()
    rows = None
    if memory is not None:
      rows = DraftRows(memory, store, np.asarray(state.history))
    found = Pass((choose(logits, text),), 0, 0)
    while True:
      new = list(found.tokens)
      ended = end_id in new
      if ended:
        new = new[: new.index(end_id) + 1]
      text += new
      yield found._replace(tokens=tuple(new))
      left = len(prompt) + max_new_tokens - len(text)
      if ended or not left:
        return
      # A draft and its verification would leave the same token undecided.
      decided, limit = len(new) > found.accepted, min(draft_length, left - 1)
      draft = []
      if decided and limit:
        draft = list(drafter(text, limit, rows))
        _require_draft(draft, limit, vocab_size)
      if draft:
        tokens = [text[-1], *draft]
        found, state = _verify_draft(
          decoder, state, rows, tokens, draft_length + 1, allowed, margin
        )
      else:
        logits, state = _step(decoder, state, rows, text[-1])
        found = Pass((choose(logits, text),), 0, 0)

  return passes()


def _require_draft(draft: list[int], limit: int, vocab_size: int) -> None:
  valid = f"at most the limit, {limit}"
  require(len(draft) <= limit, "length of the draft", len(draft), valid)
  for token in draft:
    require_integer("draft", token, low=0, high=vocab_size)


@jax.jit
def _choose(
  logits: Float[Array, "1 V"], allowed: Bool[Array, "V"]
) -> tuple[Int[Array, ""], Bool[Array, ""]]:
  """The likeliest token, of equals the smallest id; whether there is one."""
  best = jnp.argmax(jnp.where(allowed, logits, -jnp.inf), axis=-1)
  return best[0], finite_logits(logits, allowed)[0]


def _step(
  decoder: Decoder, state: DecodeState, rows: DraftRows | None, token: int
) -> tuple[Float[Array, "1 V"], DecodeState]:
  """The step of `generate`, on rows that may be held already."""

  def lookup():
    found = rows.take([token])
    rows.advance([token])
    return found, rows.history

  return decoder.start(
    state, np.array([token]), lookup=None if rows is None else lookup
  )()


class _Verdict(NamedTuple):
  """What a chunk decides of a draft; each [1].

  Attributes:
    accepted: number of drafts that are the model's choices as well.
    best: the model's choice after these.
    decided: whether it is far enough ahead of the second best.
  """

  accepted: Int[Array, "1"]
  best: Int[Array, "1"]
  decided: Bool[Array, "1"]


@functools.partial(jax.jit, donate_argnames="cache")
def _verify(
  model: DecodingModel,
  streams: Hidden,
  cache: ModelCache,
  rows: dict[int, Rows] | None,
  tokens: Int[Array, "1 L"],
  length: Int[Array, ""] | int,
  allowed: Bool[Array, "V"],
  margin: Float[Array, ""] | float,
) -> tuple[_Verdict, ModelCache]:
  def keep(logits):
    logits = jnp.where(allowed, logits, -jnp.inf)
    best, first = jnp.argmax(logits, axis=-1), jnp.max(logits, axis=-1)
    is_best = jnp.arange(logits.shape[-1]) == best[..., None]
    second = jnp.max(jnp.where(is_best, -jnp.inf, logits), axis=-1)
    # What is no number decides nothing: the step after will say so.
    decided = jnp.isfinite(first) & (first - second > margin)

    is_draft = jnp.arange(1, tokens.shape[1]) < length
    right = (best[:, :-1] == tokens[:, 1:]) & decided[:, :-1] & is_draft
    accepted = jnp.sum(jnp.cumprod(right, axis=1), axis=1)
    at = functools.partial(
      jnp.take_along_axis, indices=accepted[:, None], axis=1
    )
    verdict = _Verdict(accepted, at(best)[:, 0], at(decided)[:, 0])
    return accepted + verdict.decided, verdict

  verdict, cache = verify_blocks(model, streams, cache, rows, keep)
  return verdict, cache


def _verify_draft(
  decoder: Decoder,
  state: DecodeState,
  rows: DraftRows | None,
  tokens: list[int],
  size: int,
  allowed: Bool[np.ndarray, "V"],
  margin: float,
) -> tuple[Pass, DecodeState]:
  """One pass over the text's last token and its draft, padded to `size`."""
  missing = size - len(tokens)
  token_ids = jnp.asarray([tokens + [0] * missing], jnp.int32)
  streams, cache = _lower_blocks(decoder.model, state.cache, token_ids)
  found = None
  if rows is not None:  # read while the device is at the lower blocks
    widths = ((0, 0), (0, missing), (0, 0), (0, 0))
    found = {i: jnp.pad(x, widths) for i, x in rows.take(tokens).items()}
  verdict, cache = _verify(
    decoder.model,
    streams,
    cache,
    found,
    token_ids,
    len(tokens),
    allowed,
    margin,
  )
  verdict = jax.device_get(verdict)
  accepted, decided = int(verdict.accepted[0]), bool(verdict.decided[0])
  history = None
  if rows is not None:
    rows.advance(tokens[: accepted + decided])
    history = rows.history
  new = tokens[1 : 1 + accepted] + [int(verdict.best[0])] * decided
  found = Pass(tuple(new), len(tokens) - 1, accepted)
  return found, DecodeState(cache, history)
