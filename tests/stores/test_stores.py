"""Row stores: one reading from every home, equal to the lookup in a table."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout

from engram_jax.errors import InputError
from engram_jax.memory import pinned, stores
from engram_jax.memory.table import lookup
from engram_jax.stores.host_stores import FileStore, HostStore
from engram_jax.stores.program_stores import (
  DeviceStore,
  PinnedStore,
  TableStore,
)
from engram_jax.stores.quantization import (
  FORMATS,
  RowFormat,
  pack_rows,
  unpack_rows,
)
from engram_jax.stores.row_file_headers import Header
from engram_jax.stores.row_files import RowFile, write_row_file
from engram_jax.stores.store import (
  Buffers,
  PackedRows,
  ReadStatistics,
  to_device,
)
from engram_jax.stores.store import unpack as unpack_eagerly

ROWS = {1: 300, 14: 211}
WIDTH = 64
unpack = jax.jit(unpack_eagerly, static_argnums=(1, 2))
HOMES = ("device", "pinned", "host", "file")


def tables():
  random = np.random.default_rng(0)
  return {
    layer: random.normal(size=(rows, WIDTH)).astype(np.float32)
    for layer, rows in ROWS.items()
  }


def row_ids(seed=0, shape=(2, 9, 6)):
  """Zipfian, so that many are asked for twice."""
  random = np.random.default_rng(seed)
  return {
    layer: np.minimum(random.zipf(1.3, shape) - 1, rows - 1).astype(np.int32)
    for layer, rows in ROWS.items()
  }


def packed_tables(name="fp8"):
  row_format = RowFormat(name, WIDTH)
  packed = {i: pack_rows(x, row_format) for i, x in tables().items()}
  return packed, row_format


@pytest.fixture
def make(tmp_path):
  """Makes a store of the packed tables in one of the homes."""

  def make_store(home, name="fp8"):
    packed, row_format = packed_tables(name)
    if home == "device":
      arrays = {layer: jnp.asarray(x) for layer, x in packed.items()}
      return DeviceStore(arrays, row_format)
    if home == "pinned":
      return PinnedStore(packed, row_format)
    if home == "host":
      return HostStore(packed, row_format)
    header = Header(row_format, ROWS)
    chunks = {layer: [x] for layer, x in packed.items()}
    write_row_file(tmp_path / "rows", chunks, header)
    return FileStore(RowFile(tmp_path / "rows"))

  return make_store


def same_bits(found, expected):
  assert found.dtype == expected.dtype and found.shape == expected.shape
  word = {2: np.uint16, 4: np.uint32}[found.dtype.itemsize]
  found, expected = np.asarray(found), np.asarray(expected)
  np.testing.assert_array_equal(found.view(word), expected.view(word))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("home", HOMES)
def test_rows_are_those_of_the_lookup_bit_for_bit(make, home, name, dtype):
  store, ids = make(home, name), row_ids()
  found = unpack(store.read(ids), store.row_format, dtype)
  assert list(found) == list(ROWS)
  packed, row_format = packed_tables(name)
  for layer, rows in found.items():
    table = jnp.asarray(unpack_rows(packed[layer], row_format, dtype))
    same_bits(rows, lookup(table, jnp.asarray(ids[layer])))


@pytest.mark.parametrize("home", HOMES)
def test_a_store_says_what_it_holds_and_what_it_read(make, home):
  store, ids = make(home), row_ids()
  assert store.layers == tuple(ROWS) and store.num_rows == ROWS
  assert store.row_format == RowFormat("fp8", WIDTH)
  assert store.statistics == ReadStatistics()
  store.read(ids)
  asked = sum(x.size for x in ids.values())
  read = asked
  if home in ("host", "file"):
    read = sum(len(np.unique(x)) for x in ids.values())
    assert read < asked / 2
  assert store.statistics == (1, asked, read, 66 * read)
  store.read({14: ids[14][:1]})
  assert store.statistics.reads == 2
  assert store.statistics.rows_asked == asked + ids[14][:1].size


@pytest.mark.parametrize("home", ["host", "file"])
def test_rows_are_distinct_and_come_in_few_shapes(make, home):
  store, packed = make(home), packed_tables()[0]
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


@pytest.mark.parametrize("home", HOMES)
def test_ids_of_any_shape_and_kind(make, home):
  store, packed = make(home), packed_tables()[0]
  for shape in ((), (2, 0, 3), (4, 5, 3, 2)):
    ids = {1: np.full(shape, 7, np.int64)}
    found = unpack(store.read(ids), store.row_format)[1]
    expected = unpack_rows(packed[1][np.full(shape, 7)], store.row_format)
    np.testing.assert_array_equal(found, expected)
  from_device = {14: jnp.asarray(row_ids()[14])}
  found = unpack(store.read(from_device), store.row_format)[14]
  assert found.shape == (2, 9, 6, WIDTH)
  assert store.read({}) == PackedRows({}, {})


@pytest.mark.parametrize("home", HOMES)
def test_what_the_store_does_not_have_is_refused_by_name(make, home):
  store = make(home)
  for wrong in (-1, 211):
    ids = {1: np.zeros((1, 1, 2), int), 14: np.array([[[0, wrong]]])}
    with pytest.raises(
      InputError, match=rf"row_ids\[14\]: .*{wrong}.*; valid:"
    ):
      store.read(ids)
  with pytest.raises(
    InputError, match=r"row_ids: layers \[2\]; valid: .*1, 14"
  ):
    store.read({2: np.zeros((1, 1, 1), int)})
  assert store.statistics == ReadStatistics()


@pytest.mark.parametrize("home", ["device", "pinned"])
def test_a_program_reads_and_unpacks_in_one(make, home):
  store, ids = make(home), row_ids()

  @jax.jit
  def rows_of(ids):
    return unpack_eagerly(store.read(ids), store.row_format, jnp.bfloat16)

  found = rows_of({layer: jnp.asarray(x) for layer, x in ids.items()})
  outside = unpack(store.read(ids), store.row_format, jnp.bfloat16)
  for layer, rows in found.items():
    same_bits(rows, outside[layer])
  assert store.statistics.reads == 1  # that of the program is not counted


def test_a_pinned_table_in_a_layout_is_put_there_by_pieces(monkeypatch):
  monkeypatch.setattr(pinned, "_CHUNK", 100)  # several, the last short
  (device, *_) = jax.local_devices()
  layout = Layout(major_to_minor=(0, 1), tiling=((1,),))
  home = Format(layout, pinned.pinned_format(device).sharding)
  packed, _ = packed_tables()
  table = pinned.pin(packed[14], home)
  assert table.format == home
  np.testing.assert_array_equal(table, packed[14])
  ids = row_ids()[14]
  found = pinned.gather_on_host(table, jnp.asarray(ids))
  np.testing.assert_array_equal(found, packed[14][ids])


def test_pinned_tables_stay_in_host_memory(make):
  store = make("pinned")
  for table in store.tables.values():
    assert table.sharding.memory_kind == "pinned_host"
  found = store.read(row_ids()).packed[1]
  assert found.sharding.memory_kind == "device"


@pytest.mark.parametrize("home", ["host", "file"])
def test_buffers_are_reused_and_what_is_on_the_device_is_not_theirs(make, home):
  store, buffers = make(home), Buffers()
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


@pytest.mark.parametrize("home", ["host", "file"])
def test_threads_read_at_once(make, home):
  store, packed, wrong = make(home), packed_tables()[0], []

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


def test_tables_that_are_none_are_refused_by_name():
  packed, row_format = packed_tables()
  with pytest.raises(InputError, match=r"tables: none; valid: one or more"):
    HostStore({}, row_format)
  with pytest.raises(
    InputError, match=r"tables\[1\]: uint8\[300, 65\]; valid:"
  ):
    HostStore({1: packed[1][:, :65]}, row_format)
  with pytest.raises(
    InputError, match=r"tables\[1\]: strides .*; valid: .*C o"
  ):
    HostStore({1: packed[1][::2]}, row_format)
  with pytest.raises(InputError, match=r"tables\[1\]: uint8\[0, 66\]; valid:"):
    DeviceStore({1: jnp.zeros((0, 66), jnp.uint8)}, row_format)


def test_a_platform_that_does_not_gather_on_its_host_is_refused(monkeypatch):
  packed, row_format = packed_tables()

  def refuse(table, ids):
    raise RuntimeError("UNIMPLEMENTED: host compute\nand a long story")

  monkeypatch.setattr(stores, "gather_on_host", refuse)
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
