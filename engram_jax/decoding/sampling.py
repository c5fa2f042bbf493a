"""The next token of each sequence, from its logits.

p = softmax(logits / temperature), over the tokens that are allowed, of these
over the `top_k` likeliest, and of these over the nucleus: the smallest set
of likeliest tokens whose probabilities reach `top_p`. Temperature 0 is the
limit: the likeliest token.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from engram_jax.errors import NonFiniteError, require, require_integer

#: Below it float32 probabilities are those of temperature 0, or not numbers.
SMALLEST_TEMPERATURE = 1e-6


def allowed_tokens(
  size: int, *, vocab_size: int, pad_id: int | None
) -> Bool[np.ndarray, "V"]:
  """Which of the model's token ids may be sampled.

  Args:
    size: V, ids that the model has logits for.
    vocab_size: ids from here on belong to no token of the tokenizer.
    pad_id: an id that stands for no text; None for no such id.

  Raises:
    InputError: `vocab_size` outside 1..V, `pad_id` outside it, or nothing
      left.
  """
  require_integer("vocab_size", vocab_size)
  valid = f"1 to the model's vocab_size, {size}"
  require(1 <= vocab_size <= size, "vocab_size", vocab_size, valid)
  allowed = np.arange(size) < vocab_size
  if pad_id is not None:
    require_integer("pad_id", pad_id)
    valid = f"0 <= id < {vocab_size}"
    require(0 <= pad_id < vocab_size, "pad_id", pad_id, valid)
    allowed[pad_id] = False
  require(allowed.any(), "vocab_size", vocab_size, "an id besides pad_id")
  return allowed


def check_sampling(
  temperature: float, top_k: int | None, top_p: float | None, *, size: int
) -> None:
  """Refuses what `sample` cannot draw from: see its arguments.

  Args:
    temperature: see `sample`.
    top_k: see `sample`.
    top_p: see `sample`.
    size: V, number of token ids.
  """
  largest = float(np.finfo(np.float32).max)
  require(
    temperature == 0 or SMALLEST_TEMPERATURE <= temperature <= largest,
    "temperature",
    temperature,
    f"0 (greedy), or a number from {SMALLEST_TEMPERATURE} to {largest:.3g}",
  )
  if top_k is not None:
    require_integer("top_k", top_k)
    require(1 <= top_k <= size, "top_k", top_k, f"1 to {size}, or None")
  if top_p is not None:
    require(0 < top_p <= 1, "top_p", top_p, "0 < top_p <= 1, or None")


def sample(
  key: PRNGKeyArray | Array,
  logits: Float[Array, "B V"],
  *,
  temperature: float,
  top_k: int | None = None,
  top_p: float | None = None,
  allowed: Bool[Array | np.ndarray, "V"] | None = None,
) -> Int[Array, "B"]:
  """Draws one token per sequence; sequence b draws from `fold_in(key, b)`.

  So what is drawn for a sequence does not depend on its neighbours.

  Args:
    key: a JAX random key, new for every step; unused at temperature 0.
    logits: [B, V], any float dtype; -inf for a token of probability 0.
    temperature: 0 for the likeliest token (of equals the smallest id).
    top_k: how many of the likeliest tokens compete; None for all.
    top_p: probability that the nucleus reaches, after `top_k`; None for 1.
    allowed: bool [V], False for ids that are never drawn; at least one is
      True. See `allowed_tokens`.

  Returns:
    int32 [B].

  Raises:
    InputError: a temperature, `top_k` or `top_p` outside its range.
    NonFiniteError: logits that `finite_logits` refuses (outside jit; inside,
      look at that).
  """
  check_sampling(temperature, top_k, top_p, size=logits.shape[1])
  if not isinstance(logits, jax.core.Tracer):
    finite = np.asarray(finite_logits(logits, allowed))
    for b in np.flatnonzero(~finite):
      what = "NaN, +inf, or -inf for every token that may be drawn"
      raise NonFiniteError(f"logits[{b}]: {what}; there is nothing to draw")
  sequences = jnp.arange(logits.shape[0])
  keys = jax.vmap(lambda b: jax.random.fold_in(key, b))(sequences)
  return sample_each(
    keys,
    logits,
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    allowed=allowed,
  )


def finite_logits(
  logits: Float[Array, "B V"],
  allowed: Bool[Array | np.ndarray, "V"] | None = None,
) -> Bool[Array, "B"]:
  """Whether a token can be drawn: what `argmax` makes of NaN is a token too.

  Args:
    logits: [B, V], any float dtype.
    allowed: bool [V]; the others may be anything.

  Returns:
    bool [B]: no NaN and no +inf among the tokens allowed, and not all of them
    -inf. One pass over the logits; can be jitted.
  """
  if allowed is not None:
    logits = jnp.where(allowed, logits, -jnp.inf)
  # A maximum is NaN where any entry is.
  return jnp.isfinite(jnp.max(logits, axis=-1))


def sample_each(
  keys: PRNGKeyArray | Array,
  logits: Float[Array, "B V"],
  *,
  temperature: float,
  top_k: int | None = None,
  top_p: float | None = None,
  allowed: Bool[Array | np.ndarray, "V"] | None = None,
) -> Int[Array, "B"]:
  """As `sample`, with a key for each sequence, [B]; refuses nothing.

  What it draws of logits that `finite_logits` refuses means nothing.

  Args:
    keys: random keys, [B].
    logits: [B, V].
    temperature: see `sample`.
    top_k: see `sample`.
    top_p: see `sample`.
    allowed: bool [V], the ids that may be drawn; None for all.
  """
  size = logits.shape[1]
  logits = logits.astype(jnp.float32)
  if allowed is not None:
    logits = jnp.where(allowed, logits, -jnp.inf)
  if temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)

  # The largest becomes 0, so that a small temperature cannot overflow.
  logits = logits - jnp.max(logits, axis=-1, keepdims=True)
  # A large one is multiplied by its inverse, 0, and -inf * 0 is no number.
  impossible = jnp.isneginf(logits)
  logits = jnp.where(impossible, -jnp.inf, logits / temperature)
  draw = jax.vmap(jax.random.categorical)
  if top_k is None and top_p is None:
    return draw(keys, logits).astype(jnp.int32)

  # Ranks, not thresholds: of equally likely tokens only as many as asked for.
  order = jnp.argsort(-logits, axis=-1, stable=True)
  ranked = jnp.take_along_axis(logits, order, axis=-1)
  if top_k is not None:
    ranked = jnp.where(jnp.arange(size) < top_k, ranked, -jnp.inf)
  if top_p is not None:
    chances = jax.nn.softmax(ranked, axis=-1)
    likelier = jnp.cumsum(chances, axis=-1) - chances
    # The likeliest always stays, also where float32 takes `top_p` for 0.
    stays = (likelier < top_p) | (jnp.arange(size) == 0)
    ranked = jnp.where(stays, ranked, -jnp.inf)
  rank = draw(keys, ranked)[:, None]
  return jnp.take_along_axis(order, rank, axis=-1)[:, 0].astype(jnp.int32)
