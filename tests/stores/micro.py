"""Small tables, their packed rows, and ids as text would ask for."""

import jax
import numpy as np

from engram_jax.stores.quantization import RowFormat, pack_rows
from engram_jax.stores.store import unpack as unpack_eagerly

ROWS = {1: 300, 14: 211}
WIDTH = 64
LOCATIONS = ("device", "pinned", "host", "file")
unpack = jax.jit(unpack_eagerly, static_argnums=(1, 2))


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


def same_bits(found, expected):
  assert found.dtype == expected.dtype and found.shape == expected.shape
  word = {2: np.uint16, 4: np.uint32}[found.dtype.itemsize]
  found, expected = np.asarray(found), np.asarray(expected)
  np.testing.assert_array_equal(found.view(word), expected.view(word))
