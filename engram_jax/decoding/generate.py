"""Generation: prompts in, tokens out, step by step.

Prompts of unequal lengths share a batch, padded on the right; the padding
enters no cache that is read. Lengths are rounded up to powers of two, so that
the programs compiled for one batch of prompts serve others of its size.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from engram_jax.backbone.transformer import Transformer
from engram_jax.decoding.sampling import allowed_tokens, check_sampling, sample
from engram_jax.decoding.state import decode_step, init_state, prefill
from engram_jax.errors import InputError, require
from engram_jax.memory.compression import TokenCompression
from engram_jax.memory.hashing import NgramHash
from engram_jax.memory.retrieval import Tables

#: Stands where a sequence had ended before.
NO_TOKEN = -1
#: Shorter prompts are padded to it: not worth a program of their own.
SMALLEST_LENGTH = 16

# Static by identity (hash) and by digest (compression): a later call with the
# same objects compiles nothing. The state is given up to its successor.
_STATIC = ("hashing", "compression")
_prefill = jax.jit(prefill, static_argnames=_STATIC, donate_argnames="state")
_step = jax.jit(decode_step, static_argnames=_STATIC, donate_argnames="state")
_sample = jax.jit(sample, static_argnames=("temperature", "top_k", "top_p"))


class Step(NamedTuple):
  """What one step of `generate` yields.

  Attributes:
    tokens: int32 [B], the new token of each sequence, `end_id` included;
      `NO_TOKEN` where the sequence had ended before.
    finished: bool [B], whether it has ended with `end_id`.
  """

  tokens: Int[np.ndarray, "B"]
  finished: Bool[np.ndarray, "B"]


def generate(
  model: Transformer,
  tables: Tables | None,
  hashing: NgramHash | None,
  compression: TokenCompression | None,
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
  memory: str = "on",
) -> Iterator[Step]:
  """Continues prompts, yielding after each step.

  Sequence b draws step t from `fold_in(fold_in(key, t), b)`: its text does not
  depend on its neighbours.

  Args:
    model: the transformer.
    tables: [R, d] per Engram layer; None for a model without memory.
    hashing: its hash; None for a model without memory.
    compression: raw to canonical ids; None for a model without memory.
    prompts: token ids of each sequence, at least one.
    max_new_tokens: steps at most; fewer when all sequences end.
    key: a JAX random key; unused at temperature 0.
    temperature: see `sample`.
    top_k: see `sample`.
    top_p: see `sample`.
    end_id: token that ends a sequence; None for none.
    vocab_size: the tokenizer's; larger ids of the model are never drawn. None
      for the compression's, without one for the model's.
    pad_id: token that is never drawn; None for the memory's pad id, without a
      memory for none.
    memory: `on`, or `off`: the same model, and no Engram layer adds anything.

  Returns:
    An iterator of `Step`. Bad arguments are refused at the call, not at its
    first step.

  Raises:
    InputError: no or an empty prompt, an id outside the vocabulary, a hash
      missing or of another model, or a bad option.
  """
  config = model.config
  require(memory in ("on", "off"), "memory", memory, "on or off")
  if memory == "on" and config.engram is not None:
    for name, value in (
      ("tables", tables),
      ("hashing", hashing),
      ("compression", compression),
    ):
      require(value is not None, name, None, "the model's, or memory='off'")
  if vocab_size is None:
    has_map = compression is not None
    vocab_size = compression.vocab_size if has_map else config.vocab_size
  if pad_id is None and config.engram is not None:
    pad_id = config.engram.pad_id
  allowed = allowed_tokens(
    config.vocab_size, vocab_size=vocab_size, pad_id=pad_id
  )
  check_sampling(temperature, top_k, top_p, size=config.vocab_size)
  positive = max_new_tokens >= 1
  require(positive, "max_new_tokens", max_new_tokens, "an integer >= 1")
  if end_id is not None:
    ok = 0 <= end_id < config.vocab_size and allowed[end_id]
    require(ok, "end_id", end_id, "an id that can be drawn, or None")
  token_ids, lengths = pad_prompts(prompts, vocab_size=vocab_size)

  if memory == "off":
    tables = hashing = compression = None
  capacity = _rounded(int(lengths.max()) + max_new_tokens)
  state = init_state(model, hashing, batch=len(prompts), capacity=capacity)
  memory_of = (tables, hashing, compression)

  def steps() -> Iterator[Step]:
    finished = np.zeros(len(prompts), bool)
    logits, new_state = _prefill(model, *memory_of, state, token_ids, lengths)
    for step in range(max_new_tokens):
      drawn = _sample(
        jax.random.fold_in(key, step),
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        allowed=allowed,
      )
      tokens = np.where(finished, NO_TOKEN, np.asarray(drawn))
      if end_id is not None:
        finished = finished | (tokens == end_id)
      yield Step(tokens, finished)
      if finished.all() or step + 1 == max_new_tokens:
        return
      # A sequence that has ended goes on unread: no other one depends on it.
      logits, new_state = _step(model, *memory_of, new_state, drawn)

  return steps()


def generate_all(*args, **kwargs) -> list[list[int]]:
  """As `generate`, all at once: the new tokens of each sequence.

  A sequence that ended does so with `end_id`.
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
      if not 0 <= token_id < vocab_size:
        valid = f"token ids, 0 <= id < {vocab_size}"
        raise InputError(f"prompts[{i}]", token_id, valid)
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  padded = np.zeros((len(prompts), _rounded(int(lengths.max()))), np.int32)
  for row, prompt in zip(padded, prompts):
    row[: len(prompt)] = prompt
  return jnp.asarray(padded), jnp.asarray(lengths)


def _rounded(length: int) -> int:
  """The next power of two, at least `SMALLEST_LENGTH`."""
  return max(SMALLEST_LENGTH, 1 << (length - 1).bit_length())
