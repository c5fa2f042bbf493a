"""Stores that a compiled program reads: on the device, pinned, tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout

from engram_jax.errors import InputError
from engram_jax.stores import pinned, program_stores
from engram_jax.stores.program_stores import (
  DeviceStore,
  PinnedStore,
  TableStore,
)
from engram_jax.stores.store import unpack as unpack_eagerly
from tests.stores.micro import packed_tables, row_ids, same_bits, unpack


@pytest.mark.parametrize("location", ["device", "pinned"])
def test_a_program_reads_and_unpacks_in_one(make, location):
  store, ids = make(location), row_ids()

  @jax.jit
  def rows_of(ids):
    return unpack_eagerly(store.read(ids), store.row_format, jnp.bfloat16)

  found = rows_of({layer: jnp.asarray(x) for layer, x in ids.items()})
  outside = unpack(store.read(ids), store.row_format, jnp.bfloat16)
  for layer, rows in found.items():
    same_bits(rows, outside[layer])
  assert store.statistics.reads == 1  # that of the program is not counted


def test_pinned_tables_stay_in_host_memory(make):
  store = make("pinned")
  for table in store.tables.values():
    assert table.sharding.memory_kind == "pinned_host"
  found = store.read(row_ids()).packed[1]
  assert found.sharding.memory_kind == "device"


def test_a_pinned_table_in_a_layout_is_put_there_by_pieces():
  (device, *_) = jax.local_devices()
  layout = Layout(major_to_minor=(0, 1), tiling=((1,),))
  place = Format(layout, pinned.pinned_format(device).sharding)
  packed, _ = packed_tables()
  # Several pieces, the last a short one.
  table = pinned.pin(packed[14], place, rows_at_a_time=100)
  assert table.format == place
  np.testing.assert_array_equal(table, packed[14])
  ids = row_ids()[14]
  found = pinned.gather_on_host(table, jnp.asarray(ids))
  np.testing.assert_array_equal(found, packed[14][ids])


def test_a_platform_that_does_not_gather_on_its_host_is_refused(monkeypatch):
  packed, row_format = packed_tables()

  def refuse(table, ids):
    raise RuntimeError("UNIMPLEMENTED: host compute\nand a long story")

  monkeypatch.setattr(program_stores, "gather_on_host", refuse)
  match = (
    r"^device: .*; valid: .*; HostStore .* \(UNIMPLEMENTED: host compute\)"
  )
  with pytest.raises(InputError, match=match):
    PinnedStore(packed, row_format)


def test_a_device_store_takes_tables_of_numpy():
  packed, row_format = packed_tables()
  ids = np.array([[0, 7]])
  found = DeviceStore(packed, row_format).read({1: ids})
  assert isinstance(found.packed[1], jax.Array)
  np.testing.assert_array_equal(found.packed[1], packed[1][ids])


def test_tables_are_a_store_and_an_argument_of_a_program():
  rng = np.random.default_rng(0)
  tables = {
    i: jnp.asarray(rng.normal(size=(9, 4)), jnp.float32) for i in (2, 1)
  }
  ids = {i: jnp.asarray(rng.integers(0, 9, (2, 3, 5))) for i in (1, 2)}
  store = TableStore(tables)
  assert store.num_rows == {2: 9, 1: 9} and store.row_format.name == "float32"

  @jax.jit
  def read(store, ids):
    return unpack(store.read(ids), store.row_format)

  for found in (read(store, ids), unpack(store.read(ids), store.row_format)):
    for layer, rows in found.items():
      np.testing.assert_array_equal(rows, tables[layer][ids[layer]])
  assert store.statistics.reads == 1  # none inside a program
  doubled = jax.tree.map(lambda x: 2 * x, store)
  assert isinstance(doubled, TableStore) and doubled.num_rows == store.num_rows
  np.testing.assert_array_equal(doubled.tables[1], 2 * tables[1])

  def refused(line):
    return pytest.raises(InputError, match=f"^{line}")

  with refused("tables: none; valid: one or more layers"):
    TableStore({})
  with refused(r"tables\[1\]: float32\[9, 3\]; valid: float32 or bfloat16"):
    TableStore({2: tables[2], 1: tables[1][:, :3]})
  with refused(r"tables\[1\]: int32\[9, 4\]; valid: float32 or bfloat16"):
    TableStore({1: tables[1].astype(jnp.int32)})
  with refused(r"row_ids\[1\]: 9; valid: 0 <= id < 9"):
    store.read({1: jnp.array([9])})
