"""Stores that are read on the host: distinct rows, buffers, threads."""

import threading

import jax
import numpy as np
import pytest

from engram_jax.stores.store import Buffers, to_device
from tests.stores.micro import ROWS, packed_tables, row_ids


@pytest.mark.parametrize("location", ["host", "file"])
def test_rows_are_distinct_and_come_in_few_shapes(make, location):
  store, packed = make(location), packed_tables()[0]
  shapes = set()
  for seed in range(30):
    ids = row_ids(seed)
    found = store.read(ids)
    for layer, rows in found.packed.items():
      inverse, distinct = found.inverse[layer], np.unique(ids[layer])
      assert inverse.dtype == np.int32
      np.testing.assert_array_equal(rows[inverse], packed[layer][ids[layer]])
      np.testing.assert_array_equal(
        rows[: len(distinct)], packed[layer][distinct]
      )
      assert not rows[len(distinct) :].any()
      assert len(rows) - len(distinct) < 14  # an eighth of 108
      shapes.add(len(rows))
  assert 1 < len(shapes) <= 8
  full = store.read({1: np.arange(300).reshape(1, 1, 300)})
  assert full.packed[1].shape == (304, 66)


@pytest.mark.parametrize("location", ["host", "file"])
def test_buffers_are_reused_and_what_is_on_the_device_is_not_theirs(
  make, location
):
  store, buffers = make(location), Buffers()
  first = store.read(row_ids(0, (3, 40, 6)), buffers=buffers)
  fresh = store.read(row_ids(0, (3, 40, 6)))
  kept = to_device(first)
  second = store.read(row_ids(1, (2, 9, 6)), buffers=buffers)
  for layer in ROWS:
    assert np.shares_memory(first.packed[layer], second.packed[layer])
    assert not np.shares_memory(fresh.packed[layer], second.packed[layer])
    assert (first.packed[layer] != fresh.packed[layer]).any()  # overwritten
    np.testing.assert_array_equal(kept.packed[layer], fresh.packed[layer])
    assert isinstance(kept.inverse[layer], jax.Array)
  larger = store.read(row_ids(2, (4, 90, 6)), buffers=buffers)
  expected = store.read(row_ids(2, (4, 90, 6)))
  np.testing.assert_array_equal(larger.packed[1], expected.packed[1])


@pytest.mark.parametrize("location", ["host", "file"])
def test_threads_read_at_once(make, location):
  store, packed, wrong = make(location), packed_tables()[0], []

  def work(seed):
    buffers = Buffers()
    for turn in range(25):
      ids = row_ids(100 * seed + turn)
      found = store.read(ids, buffers=buffers)
      for layer, rows in found.packed.items():
        if (rows[found.inverse[layer]] != packed[layer][ids[layer]]).any():
          wrong.append((seed, turn))

  threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong
  assert store.statistics.reads == 6 * 25
  assert store.statistics.rows_asked == 6 * 25 * 2 * 108
