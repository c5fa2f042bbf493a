"""N-grams to row ids: DeepSeek's int64 hash, bit for bit, without int64.

For a canonical id x_t, layer multipliers m and a head of prime size p (Eq. 1):

  mix_n[t] = x_t m_0  ^  x_{t-1} m_1  ^ ... ^  x_{t-n+1} m_{n-1}     (64 bits)
  head_id  = mix_n[t] mod p,   row_id = head_id + offset of the head

All H heads of an order share one mix; columns run over orders, then heads.
Each multiplier is odd and below 2^63 / V', so a product never overflows and the
mix is never negative. JAX has 32-bit integers unless told otherwise, so the
jnp form keeps the mix as two uint32 limbs and takes the remainder without a
division (`limbs.py`); `row_ids_numpy` is the same in NumPy int64.

Three things interrupt n-grams, and all of them *latch* (production V4.1): once
a look-back meets one, that shift and every larger one read the pad id.
  - the start of the sequence, or of `history`,
  - a document start (`Break.DOCUMENT_START`): look-backs stop at it,
  - a position that is not text (`Break.NON_TEXT`, or any negative id): no
    n-gram holds it or reaches across it.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from engram_jax.errors import (
  InputError,
  check_in_range,
  require,
  require_in_range,
  require_integer,
)
from engram_jax.memory.breaks import (
  check_breaks,
  require_integers,
  resolve_breaks,
)
from engram_jax.memory.compression import NON_TEXT_ID
from engram_jax.memory.hash_constants import draw_multipliers, take_primes
from engram_jax.memory.limbs import (
  mixes_by_order,
  one_per_column,
  remainder,
)
from engram_jax.types import Break, Breaks, CanonicalIds, History, RowIds

#: As packed data have them; see `breaks_from_segments`.
Segments = Int[Array | np.ndarray, "B L"]


@dataclasses.dataclass(frozen=True, eq=False)
class NgramHash:
  """The hash of every Engram layer of a model, as constants.

  Two are equal, and hash equally, when their constants are: so one may be a
  static argument of `jax.jit`.

  Make one with `NgramHash.create`; store it with a model by `to_dict` and read
  it by `from_dict`, so that a checkpoint never depends on NumPy drawing the
  same random stream again.

  Attributes:
    vocab_size: canonical ids are below it.
    heads: H, heads per order.
    pad_id: canonical id that stands where a look-back finds nothing.
    multipliers: per layer int64 [N]; entry k belongs to the token k back.
    primes: per layer int64 [K]; rows of each head.
    smallest_order: the first n-gram order that has heads.
  """

  vocab_size: int
  heads: int
  pad_id: int
  multipliers: Mapping[int, np.ndarray]
  primes: Mapping[int, np.ndarray]
  smallest_order: int = 2

  @classmethod
  def create(
    cls,
    *,
    vocab_size: int,
    rows_per_head: Sequence[int],
    heads: int,
    layers: Sequence[int],
    pad_id: int,
    seed: int = 0,
    smallest_order: int = 2,
  ) -> "NgramHash":
    """Draws multipliers and primes as DeepSeek's demo does.

    Args:
      vocab_size: canonical ids are below it; it bounds the multipliers.
      rows_per_head: least rows of a head, one entry per order from
        `smallest_order` on.
      heads: H, heads per order.
      layers: ids of the Engram layers. Their order matters: no prime is used
        twice in a model, and the first layer takes the smallest.
      pad_id: the *canonical* id of the padding token.
      seed: seed of the multipliers.
      smallest_order: the first n-gram order; 1 for unigrams too.

    Raises:
      InputError: a size, layer or id that cannot be hashed.
    """
    sizes = {
      "vocab_size": (vocab_size,),
      "rows_per_head": rows_per_head,
      "heads": (heads,),
      "layers": layers,
      "pad_id": (pad_id,),
      "seed": (seed,),
      "smallest_order": (smallest_order,),
    }
    for name, values in sizes.items():
      for value in values:
        require_integer(name, value)
    ok = smallest_order >= 1
    require(ok, "smallest_order", smallest_order, "an integer >= 1")
    positive = len(rows_per_head) >= 1 and min(rows_per_head) >= 2
    valid = f"one entry >= 2 per n-gram order from {smallest_order} on"
    require(positive, "rows_per_head", tuple(rows_per_head), valid)
    require(heads >= 1, "heads", heads, "an integer >= 1")
    unique = len(layers) >= 1 and len(set(layers)) == len(layers)
    valid = "one or more different layer ids from 0 on"
    require(unique and min(layers) >= 0, "layers", tuple(layers), valid)
    require(seed >= 0, "seed", seed, "an integer >= 0")
    require(1 <= vocab_size < 2**31, "vocab_size", vocab_size, "1 to 2**31 - 1")

    max_order = smallest_order + len(rows_per_head) - 1
    used: set[int] = set()
    multipliers, primes = {}, {}
    for layer in layers:
      multipliers[layer] = draw_multipliers(
        layer, count=max_order, vocab_size=vocab_size, seed=seed
      )
      sizes = [
        prime
        for least in rows_per_head
        for prime in take_primes(least, heads, used)
      ]
      primes[layer] = np.array(sizes, np.int64)
    return cls(vocab_size, heads, pad_id, multipliers, primes, smallest_order)

  def __post_init__(self):
    require(
      0 <= self.pad_id < self.vocab_size,
      "pad_id",
      self.pad_id,
      f"a canonical id below vocab_size = {self.vocab_size}",
    )
    ok = 1 <= self.smallest_order <= self.max_order
    valid = f"1 to the largest order, {self.max_order}"
    require(ok, "smallest_order", self.smallest_order, valid)
    for layer in self.layers:
      self._check_layer(layer)
      self.multipliers[layer].setflags(write=False)
      self.primes[layer].setflags(write=False)

  def _check_layer(self, layer: int) -> None:
    """Refuses constants that the 64-bit arithmetic could not hold."""
    m, p = self.multipliers[layer], self.primes[layer]
    columns = self.heads * (len(m) - self.smallest_order + 1)
    name = f"primes[{layer}]"
    require(p.shape == (columns,), name, p.shape, f"shape ({columns},)")
    in_range = ((p >= 2) & (p < 2**31)).all()
    require(in_range, name, p.max(), "primes from 2 to 2**31 - 1")
    # Written with Python integers: the product is what must not overflow.
    largest = int(m.max()) * (self.vocab_size - 1)
    valid = (
      f"positive, and below 2**63 / vocab_size = {2**63 // self.vocab_size}"
    )
    ok = int(m.min()) > 0 and largest < 2**63
    require(ok, f"multipliers[{layer}]", m.tolist(), valid)

  @functools.cached_property
  def digest(self) -> str:
    """Hex sha256 of the constants."""
    return hashlib.sha256(json.dumps(self.to_dict()).encode()).hexdigest()

  def __eq__(self, other: Any) -> bool:
    return isinstance(other, NgramHash) and self.digest == other.digest

  def __hash__(self) -> int:
    return hash(self.digest)

  # --- sizes ---

  @property
  def layers(self) -> tuple[int, ...]:
    """The Engram layers, in the order in which they took their primes."""
    return tuple(self.primes)

  @property
  def max_order(self) -> int:
    """N, the largest n-gram order."""
    return len(next(iter(self.multipliers.values())))

  @property
  def columns(self) -> int:
    """K, rows that one token reads in one layer."""
    return self.heads * (self.max_order - self.smallest_order + 1)

  @property
  def num_rows(self) -> dict[int, int]:
    """R per layer: the sum of its heads' primes."""
    return {layer: int(p.sum()) for layer, p in self.primes.items()}

  def head_offsets(self, layer: int) -> np.ndarray:
    """int64 [K]: first row of each head in the layer's joined table."""
    primes = self._of(self.primes, layer)
    return np.concatenate([[0], np.cumsum(primes[:-1])]).astype(np.int64)

  # --- hashing ---

  def hash(
    self,
    canonical: CanonicalIds,
    *,
    history: History | None = None,
    breaks: Breaks | None = None,
    segment_ids: Segments | None = None,
  ) -> dict[int, RowIds]:
    """Row ids of every Engram layer; see `row_ids`.

    Args:
      canonical: int32 [B, L]; a negative id is a position without text.
      history: int32 [B, N-1], what `next_history` gave; None at the start.
      breaks: [B, L] of `Break`, or bool for document starts only.
      segment_ids: integers [B, L] of packed data in place of breaks.
    """
    breaks = resolve_breaks(breaks, segment_ids)
    return {
      layer: self.row_ids(canonical, layer, history=history, breaks=breaks)
      for layer in self.layers
    }

  def row_ids(
    self,
    canonical: CanonicalIds,
    layer: int,
    *,
    history: History | None = None,
    breaks: Breaks | None = None,
    segment_ids: Segments | None = None,
  ) -> RowIds:
    """Rows of `layer`'s joined table that each position reads.

    Args:
      canonical: int32 [B, L]; a negative id is a position without text.
      layer: one of `layers`.
      history: int32 [B, N-1], what `next_history` gave after the tokens
        before; None at the start of a sequence.
      breaks: [B, L] of `Break`, or bool for document starts only.
      segment_ids: integers [B, L] of packed data instead, 0 for padding; see
        `breaks_from_segments` for other conventions.

    Returns:
      int32 [B, L, K], each below `num_rows[layer]`.

    Raises:
      InputError: an id >= vocab_size or a value that is no `Break` (outside
        jit; inside, see `validate`), not integers, an unknown layer, a wrong
        shape, breaks and segments together, or a table of 2**31 rows or more,
        which only `row_ids_numpy` can address.
    """
    rows = self.num_rows.get(layer, 0)
    valid = "below 2**31 rows for int32 ids (row_ids_numpy takes more)"
    require(rows < 2**31, f"num_rows[{layer}]", rows, valid)
    ids = self.head_ids(
      canonical,
      layer,
      history=history,
      breaks=breaks,
      segment_ids=segment_ids,
    )
    return ids + jnp.asarray(self.head_offsets(layer), jnp.int32)

  def head_ids(
    self,
    canonical: CanonicalIds,
    layer: int,
    *,
    history: History | None = None,
    breaks: Breaks | None = None,
    segment_ids: Segments | None = None,
  ) -> RowIds:
    """As `row_ids`, without the offsets: rows within each head's own table.

    Args:
      canonical: int32 [B, L]; a negative id is a position without text.
      layer: one of `layers`.
      history: int32 [B, N-1], what `next_history` gave; None at the start.
      breaks: [B, L] of `Break`, or bool for document starts only.
      segment_ids: integers [B, L] of packed data in place of breaks.
    """
    primes = self._of(self.primes, layer)
    breaks = resolve_breaks(breaks, segment_ids)
    window = [
      jnp.where(ids < 0, self.pad_id, ids).astype(jnp.uint32)
      for ids in self._window(canonical, history, breaks)
    ]
    mixes = mixes_by_order(
      window, self.multipliers[layer], smallest_order=self.smallest_order
    )
    high, low = (one_per_column(limb, self.heads) for limb in zip(*mixes))
    return remainder(high, low, primes).astype(jnp.int32)

  def row_ids_numpy(
    self,
    canonical: np.ndarray,
    layer: int,
    *,
    history: np.ndarray | None = None,
    breaks: np.ndarray | None = None,
    segment_ids: np.ndarray | None = None,
  ) -> np.ndarray:
    """`row_ids` on the host: the same numbers, int64 [B, L, K], any size.

    Args:
      canonical: integers [B, L]; a negative id is a position without text.
      layer: one of `layers`.
      history: integers [B, N-1], the canonical ids before; None at the start.
      breaks: [B, L] of `Break`, or bool for document starts only.
      segment_ids: integers [B, L] of packed data in place of breaks.
    """
    primes = self._of(self.primes, layer)
    breaks = resolve_breaks(breaks, segment_ids)
    columns = self._window(np.asarray(canonical), history, breaks, xp=np)
    window = np.stack(columns, axis=-1)  # [B, L, N]
    window = np.where(window < 0, self.pad_id, window).astype(np.int64)
    mixes = np.bitwise_xor.accumulate(
      window * self.multipliers[layer], axis=-1
    )[..., self.smallest_order - 1 :]
    ids = np.repeat(mixes, self.heads, axis=-1) % primes
    return ids + self.head_offsets(layer)

  # --- decoding ---

  def empty_history(self, batch: int) -> History:
    """int32 [B, N-1]: nothing came before."""
    return jnp.full((batch, self.max_order - 1), NON_TEXT_ID, jnp.int32)

  def next_history(
    self,
    canonical: CanonicalIds,
    *,
    history: History | None = None,
    breaks: Breaks | None = None,
    segment_ids: Segments | None = None,
    lengths: Int[Array, "B"] | None = None,
  ) -> History:
    """What the hash of the tokens to come must know of those so far.

    Args:
      canonical: int32 [B, L], as given to `row_ids`.
      history: what came before them.
      breaks: as given to `row_ids`.
      segment_ids: as given to `row_ids`.
      lengths: int32 [B], 0 to L, how many of the L tokens are real (the rest
        is padding on the right); None for all.

    Returns:
      int32 [B, N-1], oldest first; `NON_TEXT_ID` where a look-back would stop.
    """
    breaks = resolve_breaks(breaks, segment_ids)
    window = self._window(canonical, history, breaks)
    if self.max_order == 1:
      return self.empty_history(len(canonical))
    # The look-backs of position t are ids t, t-1, ...; those of the position
    # to come are the same, one further back.
    recent = jnp.stack(window[:-1], axis=-1)[:, :, ::-1]  # [B, L, N-1]
    if not canonical.size:
      return self.empty_history(len(canonical)) if history is None else history
    if lengths is None:
      return recent[:, -1]
    require_integers("lengths", lengths)
    high = canonical.shape[1] + 1
    require_in_range("lengths", lengths, low=0, high=high)
    # By selection: under Explicit mesh axes a gather is not told its sharding.
    positions = jnp.arange(1, canonical.shape[1] + 1)
    is_last = (positions == lengths[:, None])[..., None]
    last = jnp.sum(jnp.where(is_last, recent, 0), axis=1)
    before = NON_TEXT_ID if history is None else history
    return jnp.where(lengths[:, None] == 0, before, last)

  def validate(
    self, canonical: CanonicalIds, *, breaks: Breaks | None = None
  ) -> None:
    """Refuses ids >= vocab_size, also inside a `checkify`-ed function.

    Inside a plain jit `row_ids` does not look at values: an id out of range
    then reads some row of the table. See `errors.check_in_range`.

    Args:
      canonical: as given to `row_ids`.
      breaks: as given to `row_ids`; refused if they hold what is no `Break`.
    """
    check_in_range("canonical", canonical, low=-(2**31), high=self.vocab_size)
    if breaks is not None:
      check_breaks(breaks)

  def _window(self, canonical, history, breaks, *, xp: Any = jnp):
    """N arrays [B, L]: the id k positions back; `NON_TEXT_ID` once latched."""
    require(canonical.ndim == 2, "canonical", canonical.shape, "shape [B, L]")
    require_integers("canonical", canonical)
    batch, length = canonical.shape
    past = self.max_order - 1
    if history is not None:
      valid = f"shape {(batch, past)}: the last {past} ids"
      require(history.shape == (batch, past), "history", history.shape, valid)
      require_integers("history", history)
      require_in_range("history", history, low=-(2**31), high=self.vocab_size)
    # Every negative id says that there is no text: only the top is checked.
    require_in_range("canonical", canonical, low=-(2**31), high=self.vocab_size)
    if breaks is None:
      breaks = xp.zeros_like(canonical, xp.int8)
    valid = f"shape {(batch, length)}, as the ids"
    require(breaks.shape == (batch, length), "breaks", breaks.shape, valid)

    breaks = breaks.astype(xp.int8)
    text = (canonical >= 0) & (breaks != Break.NON_TEXT)
    ids = xp.where(text, canonical, NON_TEXT_ID).astype(xp.int32)
    starts = breaks == Break.DOCUMENT_START

    def back(x, steps, fill):
      # Padded, not joined to fresh arrays: under Explicit mesh axes these would
      # have no sharding.
      shifted = xp.pad(x, ((0, 0), (steps, 0)), constant_values=fill)
      return shifted[:, :length]

    columns, reachable = [], xp.ones_like(canonical, bool)
    for steps in range(self.max_order):
      here = back(ids, steps, NON_TEXT_ID)
      if history is not None and steps:
        known = history[:, past - steps :][:, :length]
        rest = ids[:, : length - known.shape[1]]
        here = xp.concatenate([known, rest], axis=1).astype(xp.int32)
      reachable = reachable & (here >= 0)
      columns.append(xp.where(reachable, here, NON_TEXT_ID))
      # A document's first token may be read, what lies behind it may not.
      reachable = reachable & ~back(starts, steps, False)
    return columns

  def _of(self, constants: Mapping[int, np.ndarray], layer: int) -> np.ndarray:
    if layer not in constants:
      raise InputError("layer", layer, f"one of the layers {self.layers}")
    return constants[layer]

  # --- storage ---

  def to_dict(self) -> dict[str, Any]:
    """The constants as lists of Python integers, ready for JSON."""
    constants = {
      "vocab_size": self.vocab_size,
      "heads": self.heads,
      "pad_id": self.pad_id,
      "layers": list(self.layers),
      "multipliers": [self.multipliers[i].tolist() for i in self.layers],
      "primes": [self.primes[i].tolist() for i in self.layers],
    }
    # Left out where it is 2: the digests of such hashes were made without it.
    if self.smallest_order != 2:
      constants["smallest_order"] = self.smallest_order
    return constants

  @classmethod
  def from_dict(cls, constants: Mapping[str, Any]) -> "NgramHash":
    """The hash whose `to_dict` is `constants`, drawing nothing."""
    fields = "vocab_size heads pad_id layers multipliers primes".split()
    for name in fields:
      require(name in constants, f"hash.{name}", "missing", "a value")
    vocab_size, heads, pad_id, layers, multipliers, primes = (
      constants[name] for name in fields
    )

    def by_layer(values):
      return {i: np.array(v, np.int64) for i, v in zip(layers, values)}

    return cls(
      vocab_size,
      heads,
      pad_id,
      by_layer(multipliers),
      by_layer(primes),
      constants.get("smallest_order", 2),
    )
