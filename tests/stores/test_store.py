"""Row stores: read alike at every location, equal to a lookup in a table."""

import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.errors import InputError
from engram_jax.memory.table import lookup
from engram_jax.stores.host_stores import HostStore
from engram_jax.stores.program_stores import DeviceStore
from engram_jax.stores.quantization import FORMATS, RowFormat, unpack_rows
from engram_jax.stores.store import PackedRows, ReadStatistics
from tests.stores.micro import (
  LOCATIONS,
  ROWS,
  WIDTH,
  packed_tables,
  row_ids,
  same_bits,
  unpack,
)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("location", LOCATIONS)
def test_rows_are_those_of_the_lookup_bit_for_bit(make, location, name, dtype):
  store, ids = make(location, name), row_ids()
  found = unpack(store.read(ids), store.row_format, dtype)
  assert list(found) == list(ROWS)
  packed, row_format = packed_tables(name)
  for layer, rows in found.items():
    table = jnp.asarray(unpack_rows(packed[layer], row_format, dtype))
    same_bits(rows, lookup(table, jnp.asarray(ids[layer])))


@pytest.mark.parametrize("location", LOCATIONS)
def test_a_store_says_what_it_holds_and_what_it_read(make, location):
  store, ids = make(location), row_ids()
  assert store.layers == tuple(ROWS) and store.num_rows == ROWS
  assert store.row_format == RowFormat("fp8", WIDTH)
  assert store.statistics == ReadStatistics()
  store.read(ids)
  asked = sum(x.size for x in ids.values())
  read = asked
  if location in ("host", "file"):
    read = sum(len(np.unique(x)) for x in ids.values())
    assert read < asked / 2
  assert store.statistics == (1, asked, read, 66 * read)
  store.read({14: ids[14][:1]})
  assert store.statistics.reads == 2
  assert store.statistics.rows_asked == asked + ids[14][:1].size


@pytest.mark.parametrize("location", LOCATIONS)
def test_ids_of_any_shape_and_kind(make, location):
  store, packed = make(location), packed_tables()[0]
  for shape in ((), (2, 0, 3), (4, 5, 3, 2)):
    ids = {1: np.full(shape, 7, np.int64)}
    found = unpack(store.read(ids), store.row_format)[1]
    expected = unpack_rows(packed[1][np.full(shape, 7)], store.row_format)
    np.testing.assert_array_equal(found, expected)
  from_device = {14: jnp.asarray(row_ids()[14])}
  found = unpack(store.read(from_device), store.row_format)[14]
  assert found.shape == (2, 9, 6, WIDTH)
  assert store.read({}) == PackedRows({}, {})


@pytest.mark.parametrize("location", LOCATIONS)
def test_what_the_store_does_not_have_is_refused_by_name(make, location):
  store = make(location)
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
