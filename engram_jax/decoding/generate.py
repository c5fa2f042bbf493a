"""Generation: prompts in, tokens out, step by step.

Prompts of unequal lengths share a batch, padded on the right; the padding
enters no cache that is read. Lengths are rounded up to powers of two, so that
the programs compiled for one batch of prompts serve others of its size. With
fewer slots than prompts, who has finished makes room for the next.
"""

import collections
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from engram_jax.backbone.transformer import Transformer
from engram_jax.decoding.decoders import Decoded, Decoder
from engram_jax.decoding.room import require_room
from engram_jax.decoding.sampling import (
  allowed_tokens,
  check_sampling,
  finite_logits,
  sample_each,
)
from engram_jax.decoding.slots import insert, rewind
from engram_jax.decoding.weights import DecodingModel
from engram_jax.errors import (
  NonFiniteError,
  first_nonfinite,
  require,
  require_integer,
)
from engram_jax.memory.memory import Memory
from engram_jax.stores.program_stores import TableStore
from engram_jax.stores.store import RowStore

#: Stands where a sequence had ended before, or has not begun.
NO_TOKEN = -1
#: Shorter prompts are padded to it: not worth a program of their own.
SMALLEST_LENGTH = 16

_insert = jax.jit(insert, donate_argnums=0)


@functools.partial(jax.jit, static_argnames=("temperature", "top_k", "top_p"))
def draw_tokens(
  key: PRNGKeyArray | Array,
  logits: Float[Array, "B V"],
  steps: Int[Array, "B"],
  sequences: Int[Array, "B"],
  **options: Any,
) -> tuple[Int[Array, "B"], Bool[Array, "B"]]:
  """A token for each slot, and whether its logits were numbers.

  Args:
    key: of the whole generation.
    logits: [B, V].
    steps: int32 [B], the number of tokens that each sequence has drawn.
    sequences: int32 [B], the sequence in each slot.
    **options: temperature, top_k, top_p and allowed, as `sample_each` takes
      them.
  """
  fold = jax.random.fold_in
  keys = jax.vmap(lambda t, b: fold(fold(key, t), b))(steps, sequences)
  finite = finite_logits(logits, options["allowed"])
  return sample_each(keys, logits, **options), finite


class Step(NamedTuple):
  """What one step of `generate` yields.

  Attributes:
    tokens: int32 [B], the new token of each sequence, `end_id` included;
      `NO_TOKEN` where the sequence had ended before, or waits for a slot.
    finished: bool [B], whether it has ended with `end_id`.
  """

  tokens: Int[np.ndarray, "B"]
  finished: Bool[np.ndarray, "B"]


def generate(
  model: Transformer | DecodingModel,
  memory: Memory | None,
  store: RowStore | None,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  key: PRNGKeyArray | Array,
  temperature: float = 0.0,
  top_k: int | None = None,
  top_p: float | None = None,
  end_id: int | None = None,
  vocab_size: int | None = None,
  pad_id: int | None = None,
  prefetch: bool = True,
  slots: int | None = None,
) -> Iterator[Step]:
  """Continues prompts, yielding after each step.

  Sequence b draws its token t from `fold_in(fold_in(key, t), b)`: its text does
  not depend on its neighbours.

  Args:
    model: the transformer, or what `for_decoding` made of it.
    memory: the model's; None for a model without one, or to turn it off: the
      same model, and no Engram layer adds anything.
    store: where the memory's rows live, e.g. `TableStore(tables)`; None with
      `memory` None.
    prompts: token ids of each sequence, at least one.
    max_new_tokens: most new tokens of a sequence; fewer when it ends.
    key: a JAX random key; unused at temperature 0.
    temperature: see `sample`.
    top_k: see `sample`.
    top_p: see `sample`.
    end_id: token that ends a sequence; None for none.
    vocab_size: the tokenizer's; larger ids of the model are never drawn. None
      for the memory's, without one for the model's.
    pad_id: token that is never drawn; None for the memory's pad id, without a
      memory for none.
    prefetch: see `Decoder`.
    slots: sequences that are decoded at once; None for all. The others wait:
      which tokens come does not depend on it.

  Returns:
    An iterator of `Step`. Bad arguments are refused at the call, not at its
    first step; what a store raises is raised at the step that needs it.

  Raises:
    InputError: no or an empty prompt, an id outside the vocabulary, a memory
      or a store of another model or one without the other, a bad option, or
      caches that do not fit into memory.
    NonFiniteError: at the step whose logits are not finite.
  """
  allowed, vocab_size = ids_to_draw(
    model, memory, vocab_size=vocab_size, pad_id=pad_id, end_id=end_id
  )
  check_sampling(temperature, top_k, top_p, size=model.config.vocab_size)
  require_integer("max_new_tokens", max_new_tokens, low=1)
  pad = functools.partial(pad_prompts, vocab_size=vocab_size)
  _, lengths = pad(prompts)
  if slots is not None:
    require_integer("slots", slots)
    require(slots >= 1, "slots", slots, "an integer >= 1, or None")
  slots = min(slots or len(prompts), len(prompts))

  capacity = rounded_length(int(lengths.max()) + max_new_tokens)
  require_room(
    model,
    slots=slots,
    prompt=rounded_length(int(lengths.max())),
    capacity=capacity,
    max_new_tokens=max_new_tokens,
  )
  draw = functools.partial(
    draw_tokens,
    key,
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    allowed=allowed,
  )

  decoder = Decoder(model, memory, store, prefetch=prefetch)

  def steps() -> Iterator[Step]:
    with decoder:
      yield from _steps(
        decoder,
        prompts,
        pad,
        draw,
        slots=slots,
        capacity=capacity,
        max_new_tokens=max_new_tokens,
        end_id=end_id,
        blame=functools.partial(describe_nonfinite, model, store),
      )

  return steps()


def ids_to_draw(
  model: Transformer | DecodingModel,
  memory: Memory | None,
  *,
  vocab_size: int | None,
  pad_id: int | None,
  end_id: int | None,
) -> tuple[Bool[np.ndarray, "V"], int]:
  """The ids that may be drawn, and the number of ids that a prompt may have.

  Args:
    model: the transformer.
    memory: the model's; None without one, or where it is turned off.
    vocab_size: see `generate`.
    pad_id: see `generate`.
    end_id: see `generate`.

  Raises:
    InputError: ids outside their range, or an end that cannot be drawn.
  """
  config = model.config
  if vocab_size is None:
    vocab_size = (config if memory is None else memory).vocab_size
  if pad_id is None and config.engram is not None:
    pad_id = config.engram.pad_id
  allowed = allowed_tokens(
    config.vocab_size, vocab_size=vocab_size, pad_id=pad_id
  )
  # Its compression has no canonical ids for others.
  known = config.vocab_size if memory is None else memory.vocab_size
  valid = f"at most the memory's, {known}"
  require(vocab_size <= known, "vocab_size", vocab_size, valid)
  if end_id is not None:
    require_integer("end_id", end_id)
    ok = 0 <= end_id < config.vocab_size and allowed[end_id]
    require(ok, "end_id", end_id, "an id that can be drawn, or None")
  return allowed, vocab_size


def describe_nonfinite(
  model: Transformer | DecodingModel, store: RowStore | None
) -> str:
  """Which of the numbers behind logits that are not finite is not, either.

  Args:
    model: the transformer.
    store: where its memory's rows live; None without.
  """
  tables = store.tables if isinstance(store, TableStore) else None
  weights = nnx.state(model) if isinstance(model, Transformer) else model
  for name, tree in (("tables", tables), ("model", weights)):
    path = first_nonfinite(tree)
    if path is not None:
      return f"{name}{path} holds numbers that are not finite"
  unseen = store is not None and tables is None
  rows = "a row of the store is not finite, or " if unseen else ""
  return f"{rows}the model's own numbers, which are finite, grow beyond bounds"


def _steps(
  decoder: Decoder,
  prompts: Sequence[Sequence[int]],
  pad: Callable,
  draw: Callable,
  *,
  slots: int,
  capacity: int,
  max_new_tokens: int,
  end_id: int | None,
  blame: Callable[[], str],
) -> Iterator[Step]:
  """The steps of `generate`; `slots` is at most the number of prompts."""
  drawn = np.zeros(len(prompts), np.int32)  # tokens of each sequence so far
  finished = np.zeros(len(prompts), bool)
  over = finished
  holders = np.arange(slots, dtype=np.int32)  # whose sequence a slot holds
  waiting = collections.deque(range(slots, len(prompts)))

  def begin(sequence: int) -> Callable[[], Decoded]:
    fresh = decoder.init_state(1, capacity)
    return decoder.start(fresh, *pad([prompts[sequence]]))

  # Of the first that waits: its rows are there when a slot is.
  begun = None
  state = decoder.init_state(slots, capacity)
  logits, state = decoder.start(state, *pad(prompts[:slots]))()
  while True:
    drawing = draw(logits, drawn[holders], holders.copy())
    new, finite = jax.device_get(drawing)
    read = ~over[holders]
    for slot in np.flatnonzero(read & ~finite):
      b = holders[slot]
      raise NonFiniteError(
        f"the logits of prompts[{b}] at new token {drawn[b]} are not finite: "
        + blame()
      )
    # A sequence that has ended goes on unread, no other one depends on it; with
    # always the same token, so that no rows are fetched for it.
    new = np.where(read, new, 0).astype(np.int32)
    tokens = np.full(len(prompts), NO_TOKEN, np.int32)
    tokens[holders[read]] = new[read]
    drawn[holders[read]] += 1
    if end_id is not None:
      finished = finished | (tokens == end_id)
    over = finished | (drawn == max_new_tokens)

    free = np.flatnonzero(over[holders])
    end = None
    if len(free) < slots:
      if len(free):
        state = rewind(state, over[holders])
      end = decoder.start(state, new)
    starting = []
    for slot in free[: len(waiting)]:
      holders[slot] = sequence = waiting.popleft()
      starting.append((slot, begun or begin(sequence)))
      begun = None
    if waiting and begun is None:
      begun = begin(waiting[0])
    yield Step(tokens, finished)

    if end is None and not starting:
      return
    if end is not None:
      logits, state = end()
    for slot, end_prefill in starting:
      logits, state = _insert((logits, state), end_prefill(), slot)


def generate_all(*args: Any, **kwargs: Any) -> list[list[int]]:
  """As `generate`, all at once: the new tokens of each sequence.

  A sequence that ended does so with `end_id`.

  Args:
    *args: positional arguments of `generate`.
    **kwargs: keyword arguments of `generate`.
  """
  steps = list(generate(*args, **kwargs))
  columns = np.stack([step.tokens for step in steps], axis=1).tolist()
  return [[token for token in row if token != NO_TOKEN] for row in columns]


def pad_prompts(
  prompts: Sequence[Sequence[int]], *, vocab_size: int
) -> tuple[Int[Array, "B L"], Int[Array, "B"]]:
  """One array of prompts of unequal lengths.

  Args:
    prompts: token ids of each sequence.
    vocab_size: ids are below it.

  Returns:
    int32 [B, L], padded on the right with 0, L a power of two; and int32 [B],
    the lengths.

  Raises:
    InputError: no prompt, an empty one, or an id outside the vocabulary.
  """
  require(len(prompts) > 0, "prompts", "none", "one or more")
  for i, prompt in enumerate(prompts):
    valid = "one or more token ids: there is nothing to continue"
    require(len(prompt) > 0, f"prompts[{i}]", "empty", valid)
    for token_id in prompt:
      require_integer(f"prompts[{i}]", token_id, low=0, high=vocab_size)
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  padded = np.zeros(
    (len(prompts), rounded_length(int(lengths.max()))), np.int32
  )
  for row, prompt in zip(padded, prompts):
    row[: len(prompt)] = prompt
  return jnp.asarray(padded), jnp.asarray(lengths)


def rounded_length(length: int) -> int:
  """The next power of two, at least `SMALLEST_LENGTH`.

  Args:
    length: a number of tokens.
  """
  return max(SMALLEST_LENGTH, 1 << (length - 1).bit_length())
