"""Row cache: packed rows that are in use, kept on the device, for any store.

N-grams are Zipfian: a few rows are read at almost every step. Of each layer

  slots  uint8 [C, n]   packed rows, on the device
  place  int32 [R]      where a row is, on the host; 0 if it is not, else slot+1

A read sends only what is not there. A program gathers the rows from the slots
and from what was sent; another writes the latter over rows that were not used
of late: by the clock, a hand that goes round the slots, passes over each that
was used since it last came by, and takes the next one. What is found does not
depend on what is kept, to the bit.

Axes besides those of `types.py`:

  C  slots of a layer           n  bytes of a packed row
  M  rows that were sent, and zeros up to one of few numbers
"""

import dataclasses
import functools
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt8

from engram_jax.errors import require
from engram_jax.stores.program_stores import TableStore
from engram_jax.stores.store import (
  Buffers,
  PackedRows,
  ReadStatistics,
  RowIdsByLayer,
  RowStore,
  require_layers,
  require_rows_of,
  to_device,
)


class CacheStatistics(NamedTuple):
  """What a layer's cache has seen so far.

  Attributes:
    asked: row ids, of which a read may ask for one again and again.
    hits: distinct rows of a read that were on the device.
    misses: distinct rows of a read that the store was asked for.
    bytes_sent: bytes of packed rows sent to the device.
  """

  asked: int = 0
  hits: int = 0
  misses: int = 0
  bytes_sent: int = 0

  @property
  def hit_rate(self) -> float:
    """Of the distinct rows of all reads."""
    return self.hits / max(1, self.hits + self.misses)


class Clock:
  """Which slot is to be overwritten next.

  Args:
    slots: C.
  """

  def __init__(self, slots: int):
    self._used = np.zeros(slots, bool)
    self._hand = 0

  def touch(self, slots: Int[np.ndarray, "M"]) -> None:
    """Notes that these slots were used."""
    self._used[slots] = True

  def take(self, count: int) -> Int[np.ndarray, "M"]:
    """Different slots to be overwritten, at most C; they count as used."""
    taken = []
    while count:
      reach = min(len(self._used), max(count, 64))
      passed = (self._hand + np.arange(reach)) % len(self._used)
      free = np.flatnonzero(~self._used[passed])
      if len(free) >= count:
        free = free[:count]
        passed = passed[: free[-1] + 1]
      taken.append(passed[free])
      count -= len(free)
      # What was used is so no more, and what is taken is.
      self._used[passed] ^= True
      self._hand = (self._hand + len(passed)) % len(self._used)
    return np.concatenate([np.zeros(0, np.int64), *taken])


@jax.jit
def read_slots(
  slots: UInt8[Array, "C n"],
  sent: UInt8[Array, "M n"],
  source: Int[Array, "*S"],
) -> UInt8[Array, "*S n"]:
  """The rows asked for.

  Args:
    slots: before what was sent is kept.
    sent: rows.
    source: int32 [...], the slot of each row asked for; C + m for the m-th that
      was sent.
  """
  count = len(slots)
  kept = slots.at[jnp.minimum(source, count - 1)].get(mode="clip")
  new = sent.at[jnp.maximum(source - count, 0)].get(mode="clip")
  return jnp.where((source < count)[..., None], kept, new)


# A program of its own: one that also gathers from the slots copies them whole.
@functools.partial(jax.jit, donate_argnums=0)
def write_slots(
  slots: UInt8[Array, "C n"],
  sent: UInt8[Array, "M n"],
  places: Int[Array, "M"],
) -> UInt8[Array, "C n"]:
  """The slots with what was sent, in place.

  Args:
    slots: overwritten.
    sent: rows.
    places: int32 [M], slots for what was sent; C for none.
  """
  return slots.at[places].set(sent, mode="drop")


@dataclasses.dataclass(eq=False)
class _Wanted:
  """What one read asks of one layer.

  Attributes:
    ids: [U], distinct and ascending.
    inverse: [...], which of them each id is.
    missing: bool [U].
    counts: [U], how often each is asked for.
  """

  ids: np.ndarray
  inverse: np.ndarray
  missing: np.ndarray
  counts: np.ndarray

  def to_read(self) -> np.ndarray:
    """The missing ids; the last again and again, up to a power of two."""
    ids = self.ids[self.missing]
    return np.pad(ids, (0, _power_of_two(len(ids)) - len(ids)), mode="edge")


class _Layer:
  """The cache of one layer."""

  def __init__(self, slots: int, num_rows: int, size: int, device: Any):
    self._empty = lambda: jnp.zeros((slots, size), jnp.uint8, device=device)
    self.slots = self._empty()
    self.nothing = jnp.zeros((1, size), jnp.uint8, device=device)
    # NumPy's zeros take no memory before they are written to.
    self._place = np.zeros(num_rows, np.int32)
    self._owner = np.full(slots, -1)
    self._clock = Clock(slots)
    self.statistics = CacheStatistics()

  def look_up(self, layer: int, ids: np.ndarray) -> _Wanted:
    distinct, inverse, counts = np.unique(
      ids, return_inverse=True, return_counts=True
    )
    require_rows_of(layer, distinct, len(self._place))
    missing = self._place[distinct] == 0
    return _Wanted(distinct, inverse.reshape(ids.shape), missing, counts)

  def exchange(self, wanted: _Wanted, sent: Array | None, inverse: Any):
    """The rows asked for, [..., n].

    Args:
      wanted: from `look_up`.
      sent: the rows that were missing; None if none were.
      inverse: [M], which of `sent` each id of `to_read` is; None for its own.
    """
    count, missing = len(self.slots), wanted.missing
    slots = self._place[wanted.ids].astype(np.int64) - 1
    self._clock.touch(slots[~missing])
    if sent is None:
      sent, which = self.nothing, np.zeros(0, np.int64)
    else:
      which = np.arange(len(sent)) if inverse is None else np.asarray(inverse)
      which = which[: missing.sum()]
    slots[missing] = count + which
    places = np.full(len(sent), count, np.int32)
    # Of more than there are slots, those that were asked for most often.
    order = np.argsort(-wanted.counts[missing], kind="stable")[:count]
    taken = self._clock.take(len(order))
    places[which[order]] = taken
    source = slots[wanted.inverse].astype(np.int32)
    found = read_slots(self.slots, sent, source)
    if missing.any():
      self._replace(wanted.ids[missing][order], taken, sent, places)
    sums = (
      self.statistics.asked + source.size,
      self.statistics.hits + int((~missing).sum()),
      self.statistics.misses + int(missing.sum()),
      self.statistics.bytes_sent + (sent.size if missing.any() else 0),
    )
    self.statistics = CacheStatistics(*sums)
    return found

  def _replace(
    self, ids: np.ndarray, slots: np.ndarray, sent: Array, places: np.ndarray
  ) -> None:
    """Writes `sent` to `places`; the slots are these rows' from now on."""
    before = self._owner[slots]
    # In this order: whatever fails, no slot is taken for what it does not hold.
    self._place[before[before >= 0]] = 0
    self._owner[slots] = -1
    try:
      self.slots = write_slots(self.slots, sent, places)
    except BaseException:
      # The slots were given up to it, or are in an unknown state.
      self._place[self._owner[self._owner >= 0]] = 0
      self._owner[:] = -1
      self.slots = self._empty()
      raise
    self._owner[slots] = ids
    self._place[ids] = slots + 1


class CachedStore:
  """A store behind a cache on the device; itself a store.

  On the host it takes 4 bytes for each row of the store, in pages that become
  resident when a row of theirs is kept.

  Args:
    store: where the rows live.
    capacity_bytes: bytes of packed rows to keep on the device, over all layers,
      each of which has the same number.
    device: see `to_device`.

  Raises:
    InputError: a capacity of less than one row in each layer, or tables on the
      device, which need no cache there.
  """

  def __init__(
    self, store: RowStore, *, capacity_bytes: int, device: Any = None
  ):
    found, valid = type(store).__name__, "a store of packed rows"
    require(not isinstance(store, TableStore), "store", found, valid)
    size = store.row_format.bytes_per_row
    least = size * len(store.num_rows)
    slots = capacity_bytes // least
    valid = f"at least {least} bytes, a row in each layer"
    require(slots >= 1, "capacity_bytes", capacity_bytes, valid)
    self.store, self.row_format = store, store.row_format
    self.num_rows = dict(store.num_rows)
    self._device = device
    self._layers = {
      layer: _Layer(min(slots, rows), rows, size, device)
      for layer, rows in self.num_rows.items()
    }
    self._reads = 0
    self._lock = threading.Lock()

  @property
  def layers(self) -> tuple[int, ...]:
    return tuple(self.num_rows)

  @property
  def capacity(self) -> dict[int, int]:
    """Rows that are kept, per layer."""
    return {i: len(layer.slots) for i, layer in self._layers.items()}

  @property
  def by_layer(self) -> dict[int, CacheStatistics]:
    """What each layer's cache has seen so far."""
    return {i: layer.statistics for i, layer in self._layers.items()}

  @property
  def statistics(self) -> ReadStatistics:
    """See `RowStore`: of these reads, not the store's behind."""
    every = self.by_layer.values()
    return ReadStatistics(
      self._reads,
      sum(x.asked for x in every),
      sum(x.misses for x in every),
      sum(x.misses for x in every) * self.row_format.bytes_per_row,
    )

  def read(
    self, row_ids: RowIdsByLayer, *, buffers: Buffers | None = None
  ) -> PackedRows:
    """See `RowStore`; the ids are known, the rows on the device.

    Threads take turns: what one has fetched the next one finds.

    Args:
      row_ids: integers [...] per layer, known on the host.
      buffers: where rows that are not cached are put; None for fresh memory.
    """
    require_layers(row_ids, self.num_rows)
    row_ids = {layer: np.asarray(ids) for layer, ids in row_ids.items()}
    with self._lock:
      wanted = {i: self._layers[i].look_up(i, x) for i, x in row_ids.items()}
      missing = {i: x.to_read() for i, x in wanted.items() if x.missing.any()}
      sent = self._send(missing, buffers)
      packed = {
        i: self._layers[i].exchange(x, sent.packed.get(i), sent.inverse.get(i))
        for i, x in wanted.items()
      }
      self._reads += 1
    return PackedRows(packed, dict.fromkeys(packed))

  def _send(
    self, row_ids: Mapping[int, np.ndarray], buffers: Buffers | None
  ) -> PackedRows:
    """Rows on the device, and on the host which of them each id names."""
    if not row_ids:
      return PackedRows({}, {})
    rows = self.store.read(row_ids, buffers=buffers)
    if isinstance(next(iter(rows.packed.values())), jax.Array):
      return rows
    # The last call that looks at the buffers: these are overwritten.
    alone = PackedRows(rows.packed, dict.fromkeys(rows.packed))
    return PackedRows(to_device(alone, self._device).packed, rows.inverse)


def _power_of_two(number: int) -> int:
  return 1 << max(0, number - 1).bit_length()
