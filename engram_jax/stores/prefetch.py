"""Rows fetched ahead of the model, on a thread, from any store.

  token ids -> row ids -> store.read -> packed bytes on the device
  |________________ a thread of its own ________________|

What a model reads follows from its tokens, so that rows can be asked for as
soon as these are known and waited for when they are needed. On the way a
thread reads into memory of its own, which it uses again and again.

A fetch is a `concurrent.futures.Future`: `result()` waits for the rows, and
raises there what went wrong in the thread.
"""

import collections
import concurrent.futures
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np

from engram_jax.errors import require
from engram_jax.memory.hashing import NgramHash
from engram_jax.stores.store import (
  Buffers,
  OwnBuffers,
  PackedRows,
  RowIdsByLayer,
  RowStore,
  to_device,
)

Fetch = concurrent.futures.Future
Item = TypeVar("Item")


def row_ids_on_host(
  hashing: NgramHash,
  canonical: Any,
  *,
  history: Any = None,
  breaks: Any = None,
) -> dict[int, np.ndarray]:
  """`NgramHash.hash` in NumPy: int64 [B, L, K] per Engram layer.

  Args:
    hashing: the model's.
    canonical: int32 [B, L].
    history: int32 [B, N-1], the canonical ids before; None at the start.
    breaks: [B, L] of `Break`.
  """
  canonical, history, breaks = (
    None if x is None else np.asarray(x) for x in (canonical, history, breaks)
  )
  return {
    layer: hashing.row_ids_numpy(
      canonical, layer, history=history, breaks=breaks
    )
    for layer in hashing.layers
  }


def read_to_device(
  store: RowStore,
  row_ids: RowIdsByLayer,
  *,
  buffers: Buffers | None = None,
  device: Any = None,
) -> PackedRows:
  """Reads rows, and brings them to the device if they are not there.

  Args:
    store: any.
    row_ids: as its `read` takes them.
    buffers: the calling thread's buffers; free again when this returns.
    device: see `to_device`; only stores that read on the host use it.

  Returns:
    A row for each id, [..., n], whatever the number of distinct ones: a model
    that takes them is compiled once.
  """
  rows = store.read(row_ids, buffers=buffers)
  leaves = jax.tree.leaves(rows)
  if all(isinstance(leaf, jax.Array) for leaf in leaves):
    return _row_for_each_id(rows)
  if any(inverse is None for inverse in rows.inverse.values()):
    return _row_for_each_id(to_device(rows, device))
  # Gathering copies them: they need no other memory of their own before. The
  # buffers are read until it is done.
  rows = _row_for_each_id(jax.device_put(rows, device))
  return jax.block_until_ready(rows)


@jax.jit
def _row_for_each_id(rows: PackedRows) -> PackedRows:
  packed = dict(rows.packed)
  for layer, inverse in rows.inverse.items():
    if inverse is not None:
      found = packed[layer].at[inverse]
      packed[layer] = found.get(mode="promise_in_bounds")
  return PackedRows(packed, dict.fromkeys(packed))


class Prefetcher:
  """Threads that read the rows of all Engram layers and bring them over.

  Use it as a context, or `close` it: its threads end then. (Left open, they
  end with the interpreter, after what they have begun.) A read that failed
  leaves it as it was.

  Args:
    store: where the rows live.
    hashing: the model's, for `fetch_tokens`; None to `fetch` row ids alone.
    threads: how many read at once; one gives rows in the order of asking.
    depth: fetches that may wait or run at a time; a further one makes its
      caller wait. What was fetched stays on the device while its `Fetch` does.
    device: see `to_device`.

  Raises:
    InputError: a number below 1, or a hash of other rows than the store's.
  """

  def __init__(
    self,
    store: RowStore,
    hashing: NgramHash | None = None,
    *,
    threads: int = 1,
    depth: int = 2,
    device: Any = None,
  ):
    require(threads >= 1, "threads", threads, "an integer >= 1")
    require(depth >= 1, "depth", depth, "an integer >= 1")
    if hashing is not None:
      require_rows(store, hashing)
    self.store, self.hashing = store, hashing
    self._device = device
    self._closed = False
    self._closing = threading.Lock()
    self._room = threading.BoundedSemaphore(depth)
    self._own = OwnBuffers()
    self._pool = concurrent.futures.ThreadPoolExecutor(
      threads, thread_name_prefix="engram-prefetch"
    )

  def fetch(
    self, row_ids: RowIdsByLayer | Callable[[], RowIdsByLayer]
  ) -> Fetch[PackedRows]:
    """Starts to read rows.

    Args:
      row_ids: integers [...] per layer, on the host; not to be changed before
        the result is there. Or what gives them, to be called by the thread.

    Returns:
      A future of `PackedRows` on the device, for `unpack`. Its `result()`
      raises what the store raised.

    Raises:
      InputError: the prefetcher is closed.
    """
    self._room.acquire()
    try:
      with self._closing:
        # Closing may have been what made the room.
        valid = "an open one: this one was closed"
        require(not self._closed, "prefetcher", "closed", valid)
        future = self._pool.submit(self._read, row_ids)
    except BaseException:
      self._room.release()
      raise
    # Also of one that is cancelled before it begins.
    future.add_done_callback(lambda _: self._room.release())
    return future

  def fetch_tokens(
    self, canonical: Any, *, history: Any = None, breaks: Any = None
  ) -> Fetch[PackedRows]:
    """As `fetch`, of what these tokens read; the thread hashes them too.

    Args:
      canonical: int32 [B, L], canonical ids.
      history: int32 [B, N-1], the canonical ids before; None at the start.
      breaks: [B, L] of `Break`, or bool for document starts only.

    Raises:
      InputError: the prefetcher is closed, or has no hash.
    """
    hashing = self.hashing
    valid = "the model's hash, given to the Prefetcher"
    require(hashing is not None, "hashing", None, valid)
    return self.fetch(
      lambda: row_ids_on_host(
        hashing, canonical, history=history, breaks=breaks
      )
    )

  def close(self) -> None:
    """Drops what has not begun, waits for the rest, and ends the threads."""
    with self._closing:
      self._closed = True
    self._pool.shutdown(wait=True, cancel_futures=True)

  def __enter__(self) -> "Prefetcher":
    return self

  def __exit__(self, *exception: Any) -> None:
    self.close()

  def _read(
    self, row_ids: RowIdsByLayer | Callable[[], RowIdsByLayer]
  ) -> PackedRows:
    return read_to_device(
      self.store,
      row_ids() if callable(row_ids) else row_ids,
      buffers=self._own.buffers,
      device=self._device,
    )


def prefetched(
  items: Iterable[Item],
  start: Callable[[Item], Fetch[PackedRows]],
  *,
  ahead: int = 1,
) -> Iterator[tuple[Item, PackedRows]]:
  """Items with their rows, which are fetched while the items before are used.

  Args:
    items: batches, say.
    start: begins the fetch of one, by a `Prefetcher`.
    ahead: items whose fetch is begun before they are asked for; 0 for none.

  Yields:
    The item and its rows on the device. What `items`, `start` or a fetch
    raised is raised where the item would come, after those before it.
  """
  require(ahead >= 0, "ahead", ahead, "an integer >= 0")
  under_way = collections.deque()
  source, more = iter(items), True
  try:
    while more or under_way:
      while more and len(under_way) <= ahead:
        try:
          item = next(source)
          under_way.append((item, start(item)))
        except StopIteration:
          more = False
        except Exception as error:
          more, failed = False, Fetch()
          failed.set_exception(error)
          under_way.append((None, failed))
      if under_way:
        item, fetch = under_way.popleft()
        yield item, fetch.result()
  finally:
    for _, fetch in under_way:
      fetch.cancel()


def require_rows(store: RowStore, hashing: NgramHash) -> None:
  """Refuses a store of other layers than the hash's, or with fewer rows.

  Args:
    store: the store to check.
    hashing: the hash whose ids it is to be read with.
  """
  found, wanted = dict(store.num_rows), hashing.num_rows
  valid = f"rows of the layers {sorted(wanted)}"
  same = sorted(found) == sorted(wanted)
  require(same, "store.layers", sorted(found), valid)
  for layer, rows in wanted.items():
    valid = f"at least the hash's {rows}"
    name = f"store.num_rows[{layer}]"
    require(found[layer] >= rows, name, found[layer], valid)
