"""Hot rows: a cache that changes what is sent, and nothing of what is read."""

import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.errors import InputError
from engram_jax.stores import row_cache
from engram_jax.stores.host_stores import HostStore
from engram_jax.stores.program_stores import DeviceStore
from engram_jax.stores.quantization import RowFormat
from engram_jax.stores.row_cache import CachedStore, CacheStatistics, Clock
from engram_jax.stores.store import Buffers, PackedRows, unpack

ROWS = {1: 300, 14: 211}
FORMAT = RowFormat("bfloat16", 8)
SIZE = FORMAT.bytes_per_row


def tables():
  random = np.random.default_rng(0)
  return {
    layer: random.integers(0, 256, (rows, SIZE), dtype=np.uint8)
    for layer, rows in ROWS.items()
  }


def row_ids(seed, shape=(2, 9, 6)):
  """Zipfian, so that some rows are asked for again and again."""
  random = np.random.default_rng(seed)
  return {
    layer: np.minimum(random.zipf(1.3, shape) - 1, rows - 1)
    for layer, rows in ROWS.items()
  }


def cached(rows, store=None):
  store = store or HostStore(tables(), FORMAT)
  return CachedStore(store, capacity_bytes=rows * SIZE * len(ROWS))


@pytest.mark.parametrize("location", ["host", "device"])
@pytest.mark.parametrize("capacity", [1, 7, 1000])
def test_rows_are_those_of_the_store_to_the_bit(capacity, location):
  packed = tables()
  store = HostStore(packed, FORMAT)
  if location == "device":
    arrays = {layer: jnp.asarray(x) for layer, x in packed.items()}
    store = DeviceStore(arrays, FORMAT)
  cache, buffers = cached(capacity, store), Buffers()
  assert cache.capacity == {i: min(capacity, r) for i, r in ROWS.items()}
  assert cache.layers == store.layers and cache.row_format == FORMAT
  # Batches and single steps in turn; both kinds of location pad differently.
  for seed in range(8):
    ids = row_ids(seed, (1, 1, 6) if seed % 2 else (2, 9, 6))
    found = cache.read(ids, buffers=buffers)
    for layer, rows in found.packed.items():
      assert found.inverse[layer] is None
      np.testing.assert_array_equal(rows, packed[layer][ids[layer]])
  numbers = unpack(found, FORMAT, jnp.bfloat16)[14]
  np.testing.assert_array_equal(
    np.asarray(numbers).view(np.uint8), packed[14][ids[14]]
  )


def test_it_counts_and_sends_what_is_not_there_only():
  store = HostStore(tables(), FORMAT)
  cache = cached(8, store)
  ids = {1: np.array([5, 3, 5, 5]), 14: np.array([200])}
  cache.read(ids)
  assert cache.by_layer == {
    1: CacheStatistics(asked=4, hits=0, misses=2, bytes_sent=2 * SIZE),
    14: CacheStatistics(asked=1, hits=0, misses=1, bytes_sent=SIZE),
  }
  assert cache.statistics == (1, 5, 3, 3 * SIZE)
  cache.read({1: np.array([3, 5, 9])})
  assert cache.by_layer[1] == (7, 2, 3, 3 * SIZE)
  assert cache.by_layer[1].hit_rate == 2 / 5
  before = store.statistics
  cache.read({1: np.array([[9, 3, 5]]), 14: np.array([200])})
  assert store.statistics == before  # nothing was missing
  assert cache.read({}) == PackedRows({}, {})


def test_eviction_is_by_the_clock_to_the_slot():
  """Against the clock of a textbook, one row at a time."""
  capacity, cache = 5, cached(5)
  slots, used, hand = [None] * capacity, [False] * capacity, 0
  random = np.random.default_rng(1)
  hits = 0
  for row in np.minimum(random.zipf(1.2, 400) - 1, 210).tolist():
    if row in slots:
      hits += 1
      used[slots.index(row)] = True
    else:
      while used[hand]:
        used[hand] = False
        hand = (hand + 1) % capacity
      slots[hand], used[hand] = row, True
      hand = (hand + 1) % capacity
    cache.read({14: np.array([row])})
    assert cache.by_layer[14].hits == hits
  assert 50 < hits < 350


def test_the_clock_takes_each_slot_once():
  random, clock = np.random.default_rng(0), Clock(100)
  for _ in range(200):
    clock.touch(random.integers(0, 100, random.integers(0, 100)))
    count = int(random.integers(0, 101))
    taken = clock.take(count)
    assert len(set(taken.tolist())) == len(taken) == count
  clock = Clock(4)
  assert clock.take(2).tolist() == [0, 1]
  clock.touch(np.array([2]))
  assert clock.take(1).tolist() == [3]


def test_of_too_many_rows_those_asked_for_most_are_kept():
  cache = cached(2)
  cache.read({1: np.array([0, 1, 1, 2, 3, 3, 3, 4])})
  before = cache.by_layer[1]
  cache.read({1: np.array([1, 3])})
  assert cache.by_layer[1].hits - before.hits == 2


def test_a_step_like_another_compiles_nothing(monkeypatch):
  # 12 ids may miss by 1, 2, 4, 8 or 16; of eighths sent there are few kinds.
  chex.clear_trace_counter()
  for name in ("read_slots", "write_slots"):
    plain = getattr(row_cache, name).__wrapped__
    counted = jax.jit(chex.assert_max_traces(plain, n=8))
    monkeypatch.setattr(row_cache, name, counted)
  cache = cached(40)
  for seed in range(50):
    cache.read(row_ids(seed, (1, 2, 6)))


def test_towrite_slots_a_row_costs_what_a_row_does():
  def temp(slots):
    few = jnp.zeros((4, 64), jnp.uint8)
    shapes = jnp.zeros((slots, 64), jnp.uint8), few, jnp.zeros(4, jnp.int32)
    compiled = (
      row_cache.write_slots.lower(*shapes).compile(),
      row_cache.read_slots.lower(*shapes).compile(),
    )
    reports = [program.memory_analysis() for program in compiled]
    # The slots are both argument and result.
    assert reports[0].alias_size_in_bytes == slots * 64
    return sum(report.temp_size_in_bytes for report in reports)

  assert temp(100_000) == temp(1_000) < 10_000


def test_threads_read_at_once():
  packed, cache, wrong = tables(), cached(30), []

  def work(seed):
    buffers = Buffers()
    for turn in range(10):
      ids = row_ids(100 * seed + turn, (1, 2, 6))
      found = cache.read(ids, buffers=buffers).packed
      for layer, rows in found.items():
        if (np.asarray(rows) != packed[layer][ids[layer]]).any():
          wrong.append((seed, turn))

  threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong
  assert cache.statistics.reads == 30
  assert cache.statistics.rows_asked == 30 * 2 * 12


def test_a_failing_store_leaves_the_cache_as_it_was():
  class Failing(HostStore):
    fails = False

    def read(self, row_ids, *, buffers=None):
      if self.fails:
        raise OSError("the disk is gone")
      return super().read(row_ids, buffers=buffers)

  store = Failing(tables(), FORMAT)
  cache = cached(4, store)
  cache.read({1: np.array([7])})
  store.fails = True
  before = cache.by_layer
  with pytest.raises(OSError, match="the disk is gone"):
    cache.read({1: np.array([7, 8])})
  assert cache.by_layer == before
  found = cache.read({1: np.array([7])})  # is still there
  np.testing.assert_array_equal(found.packed[1][0], tables()[1][7])


@pytest.mark.parametrize(
  "part", ["read_slots", "write_slots", "write_slots, done"]
)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_fails_on_the_device_is_not_taken_for_kept(
  monkeypatch, part, error
):
  # A cache that is full, so that others make room.
  cache, before, ids = cached(4), row_ids(1), row_ids(0)
  cache.read(before)
  part, _, done = part.partition(", ")
  plain = getattr(row_cache, part)

  def fails(*arguments):
    if done:
      plain(*arguments)  # the slots are given up
    raise error("RESOURCE_EXHAUSTED")

  monkeypatch.setattr(row_cache, part, fails)
  with pytest.raises(error, match="RESOURCE_EXHAUSTED"):
    cache.read(ids)
  monkeypatch.setattr(row_cache, part, plain)
  for asked in (before, ids, before):
    expected = cached(40).read(asked).packed
    for layer, rows in cache.read(asked).packed.items():
      np.testing.assert_array_equal(rows, expected[layer])


def test_refusals_by_name():
  store = HostStore(tables(), FORMAT)
  valid = f"at least {2 * SIZE} bytes, a row in each layer"
  for wrong in (0, 2 * SIZE - 1):
    with pytest.raises(
      InputError, match=f"capacity_bytes: {wrong}; valid: {valid}"
    ):
      CachedStore(store, capacity_bytes=wrong)
  cache = cached(4, store)
  for wrong in (-1, 211):
    with pytest.raises(InputError, match=rf"row_ids\[14\]: .*{wrong}.*; valid"):
      cache.read({1: np.array([0]), 14: np.array([wrong])})
  with pytest.raises(InputError, match=r"row_ids: layers \[2\]; valid: .*1, 1"):
    cache.read({2: np.array([0])})
  assert cache.by_layer[1] == CacheStatistics()
