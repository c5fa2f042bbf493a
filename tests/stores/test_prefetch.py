"""Prefetching: the rows of the store, later asked for than begun."""

import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.errors import InputError
from engram_jax.memory.hashing import NgramHash
from engram_jax.stores.host_stores import HostStore
from engram_jax.stores.prefetch import Prefetcher, prefetched, row_ids_on_host
from engram_jax.stores.program_stores import DeviceStore
from engram_jax.stores.quantization import RowFormat
from experiments.benchmarks.fixtures import SlowStore

FORMAT = RowFormat("float32", 4)
HASHING = NgramHash.create(
  vocab_size=50, rows_per_head=(60, 70), heads=2, layers=(1, 3), pad_id=2
)
PREFIX = "engram-prefetch"


def packed_tables():
  random = np.random.default_rng(0)
  return {
    layer: random.integers(0, 256, (rows, 16), dtype=np.uint8)
    for layer, rows in HASHING.num_rows.items()
  }


def host():
  return HostStore(packed_tables(), FORMAT)


class Failing:
  """A store whose reads fail where the first id is 0."""

  def __init__(self):
    self.store = host()
    self.row_format, self.num_rows = FORMAT, HASHING.num_rows
    self.statistics = self.store.statistics

  def read(self, row_ids, *, buffers=None):
    if row_ids[1].flat[0] == 0:
      raise OSError("page 7 cannot be read")
    return self.store.read(row_ids, buffers=buffers)


def ids_of(seed, shape=(2, 5, 4)):
  random = np.random.default_rng(seed)
  return {
    layer: 1 + random.integers(0, rows - 1, shape)
    for layer, rows in HASHING.num_rows.items()
  }


def check(found, row_ids):
  packed = packed_tables()
  assert set(found.packed) == set(row_ids)
  for layer, ids in row_ids.items():
    rows = found.packed[layer]
    assert isinstance(rows, jax.Array) and found.inverse[layer] is None
    np.testing.assert_array_equal(rows, packed[layer][ids])


def alive():
  return [t for t in threading.enumerate() if t.name.startswith(PREFIX)]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("location", [host, "device"])
def test_many_fetches_under_way_keep_their_rows(location, threads):
  if location == "device":
    tables = {i: jnp.asarray(x) for i, x in packed_tables().items()}
    store = DeviceStore(tables, FORMAT)
  else:
    store = location()
  with Prefetcher(store, threads=threads, depth=4) as prefetcher:
    # All results are held: none may lie in memory that a later read takes.
    fetches = [prefetcher.submit(ids_of(seed)) for seed in range(12)]
    for seed, fetch in enumerate(fetches):
      check(fetch.result(), ids_of(seed))
  assert not alive()


def test_tokens_are_hashed_on_the_way():
  random = np.random.default_rng(0)
  canonical = random.integers(0, 50, (2, 6)).astype(np.int32)
  history = random.integers(0, 50, (2, 2)).astype(np.int32)
  breaks = random.random((2, 6)) < 0.2
  expected = HASHING.hash(
    jnp.asarray(canonical),
    history=jnp.asarray(history),
    breaks=jnp.asarray(breaks),
  )
  known = dict(history=history, breaks=breaks)
  on_host = row_ids_on_host(HASHING, canonical, **known)
  for layer, ids in expected.items():
    np.testing.assert_array_equal(on_host[layer], ids)
  with Prefetcher(host(), HASHING) as prefetcher:
    fetch = prefetcher.submit_tokens(jnp.asarray(canonical), **known)
    check(fetch.result(), on_host)


class Held(Failing):
  """A store whose reads wait for leave."""

  def __init__(self):
    super().__init__()
    self.entered, self.go_on = threading.Semaphore(0), threading.Event()

  def read(self, row_ids, *, buffers=None):
    self.entered.release()
    assert self.go_on.wait(60)
    return super().read(row_ids, buffers=buffers)


def test_the_caller_goes_on_while_rows_are_read():
  store = Held()
  with Prefetcher(store) as prefetcher:
    fetch = prefetcher.submit(ids_of(1))
    assert store.entered.acquire(timeout=60)
    assert not fetch.done()
    store.go_on.set()
    check(fetch.result(), ids_of(1))


def test_no_more_than_depth_are_under_way():
  store, begun = Held(), []

  def ask(prefetcher):
    for seed in range(4):
      begun.append(prefetcher.submit(ids_of(seed)))

  with Prefetcher(store, depth=2) as prefetcher:
    caller = threading.Thread(target=ask, args=(prefetcher,))
    caller.start()
    deadline = time.monotonic() + 60
    while len(begun) < 2 and time.monotonic() < deadline:
      time.sleep(0.01)
    time.sleep(0.05)
    assert len(begun) == 2 and caller.is_alive()
    store.go_on.set()
    caller.join(60)
    assert len(begun) == 4
    for seed, fetch in enumerate(begun):
      check(fetch.result(), ids_of(seed))


def test_what_the_store_raises_comes_with_the_result_and_stops_nothing():
  bad = {layer: 0 * ids for layer, ids in ids_of(0).items()}
  outside = {layer: ids + 10**6 for layer, ids in ids_of(0).items()}
  with Prefetcher(Failing(), HASHING) as prefetcher:
    for _ in range(3):  # no room is lost on the way
      first, second = prefetcher.submit(bad), prefetcher.submit(outside)
      with pytest.raises(OSError, match="page 7 cannot be read"):
        first.result()
      with pytest.raises(InputError, match=r"row_ids\[1\]: "):
        second.result()
      check(prefetcher.submit(ids_of(1)).result(), ids_of(1))
    with pytest.raises(InputError, match=r"^canonical: 99"):
      prefetcher.submit_tokens(np.full((1, 3), 99, np.int32)).result()


def test_a_closed_one_says_so_and_waits_for_nobody():
  prefetcher = Prefetcher(SlowStore(host(), delay_s=0.3), depth=8)
  fetches = [prefetcher.submit(ids_of(seed)) for seed in range(8)]
  prefetcher.close()
  prefetcher.close()
  assert not alive()
  # Those that had begun are done, the others were dropped.
  assert all(fetch.done() for fetch in fetches) and fetches[-1].cancelled()
  with pytest.raises(InputError, match="prefetcher: closed; valid: an open"):
    prefetcher.submit(ids_of(0))


def test_an_error_in_the_context_ends_the_threads_too():
  with pytest.raises(RuntimeError, match="mine"):
    with Prefetcher(host()) as prefetcher:
      prefetcher.submit(ids_of(0))
      raise RuntimeError("mine")
  assert not alive()


def test_the_interpreter_ends_with_one_left_open():
  program = """
import numpy as np
from engram_jax.stores.prefetch import Prefetcher
from engram_jax.stores.quantization import RowFormat
from engram_jax.stores.host_stores import HostStore
store = HostStore({0: np.zeros((9, 16), np.uint8)}, RowFormat("float32", 4))
prefetcher = Prefetcher(store)
kept = prefetcher.submit({0: np.arange(4)})
prefetcher.submit({0: np.arange(4)})
print("at the end", flush=True)
"""
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, timeout=300
  )
  assert done.returncode == 0 and done.stdout == "at the end\n", done.stderr
  assert not done.stderr


@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_an_iterator_is_ahead_by_so_many(ahead):
  started = []
  with Prefetcher(host(), depth=1) as prefetcher:

    def start(seed):
      started.append(seed)
      return prefetcher.submit(ids_of(seed))

    seeds = []
    for seed, rows in prefetched(iter(range(4)), start, ahead=ahead):
      assert len(started) == min(4, seed + 1 + ahead)
      check(rows, ids_of(seed))
      seeds.append(seed)
    assert seeds == [0, 1, 2, 3]
    assert list(prefetched([], start)) == []


def test_an_iterator_raises_where_the_item_would_come():
  bad = {layer: 0 * ids for layer, ids in ids_of(0).items()}
  with Prefetcher(Failing()) as prefetcher:
    items = prefetched([ids_of(0), bad, ids_of(1)], prefetcher.submit)
    check(next(items)[1], ids_of(0))
    with pytest.raises(OSError, match="page 7"):
      next(items)
    check(prefetcher.submit(ids_of(2)).result(), ids_of(2))


def test_what_the_items_raise_comes_after_those_before():
  def items():
    yield ids_of(0)
    yield ids_of(1)
    raise OSError("the pipe broke")

  with Prefetcher(host(), depth=8) as prefetcher:
    for ahead in (0, 1, 4):
      found = prefetched(items(), prefetcher.submit, ahead=ahead)
      for seed in (0, 1):
        check(next(found)[1], ids_of(seed))
      with pytest.raises(OSError, match="the pipe broke"):
        next(found)
  found = prefetched([ids_of(0)], prefetcher.submit)
  with pytest.raises(InputError, match="prefetcher: closed"):
    next(found)


def test_refusals_by_name():
  for change in ({"threads": 0}, {"depth": 0}):
    (name,) = change
    with pytest.raises(InputError, match=f"{name}: 0; valid: an integer >= 1"):
      Prefetcher(host(), **change)
  with pytest.raises(InputError, match="ahead: -1"):
    next(prefetched([], lambda item: None, ahead=-1))
  with Prefetcher(host()) as prefetcher:
    with pytest.raises(InputError, match="hashing: None; valid: the model's"):
      prefetcher.submit_tokens(np.zeros((1, 1), np.int32))
  larger = NgramHash.create(
    vocab_size=50, rows_per_head=(90, 90), heads=2, layers=(1, 3), pad_id=2
  )
  with pytest.raises(
    InputError, match=r"store.num_rows\[1\]: .*; valid: at least the hash's"
  ):
    Prefetcher(host(), larger)
  other = NgramHash.create(
    vocab_size=50, rows_per_head=(60, 70), heads=2, layers=(1, 2), pad_id=2
  )
  with pytest.raises(
    InputError, match=r"store.layers: \[1, 3\]; valid: rows of the layers"
  ):
    Prefetcher(host(), other)
  assert not alive()
