"""Rows of all layers at once, its shuffled control, its refusals."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.errors import InputError
from engram_jax.memory.hashing import NgramHash
from engram_jax.memory.lookup import (
  Lookup,
  lookup_rows,
  require_tables,
  shuffle_row_ids,
)

HASHING = NgramHash.create(
  vocab_size=50, rows_per_head=(30, 40), heads=2, layers=(3, 0), pad_id=2
)
# One more row than the hash needs, as a table padded for sharding has.
TABLES = {
  layer: jax.random.normal(jax.random.key(layer), (rows + 1, 5))
  for layer, rows in HASHING.num_rows.items()
}
TOKENS = jax.random.randint(jax.random.key(7), (2, 6), 0, 50)


def test_rows_are_those_of_the_ids():
  ids = HASHING.hash(TOKENS)
  found = jax.jit(lookup_rows)(TABLES, ids)
  chex.assert_trees_all_equal(found.row_ids, ids)
  assert found.plan is None and found.is_complete
  for layer in HASHING.layers:
    rows = np.asarray(TABLES[layer])[np.asarray(ids[layer])]
    np.testing.assert_array_equal(found.rows[layer], rows)


def test_a_lookup_of_nothing_is_of_no_layer():
  assert lookup_rows({}, {}) == Lookup({}, {})


def test_shuffled_positions_read_real_rows_but_never_their_own():
  places = jnp.arange(12).reshape(2, 6, 1) + jnp.zeros(4, jnp.int32)
  ids = {0: places, 3: places + 100}
  shuffled = jax.jit(shuffle_row_ids)(jax.random.key(1), ids)
  np.testing.assert_array_equal(shuffled[0] + 100, shuffled[3])
  source = np.asarray(shuffled[0]).reshape(12, 4)
  assert (source == source[:, :1]).all()
  # One cycle through all positions, so no position keeps its own rows.
  place, seen = 0, []
  for _ in range(12):
    seen.append(place)
    place = source[place, 0]
  assert place == 0 and sorted(seen) == list(range(12))
  other = shuffle_row_ids(jax.random.key(2), ids)
  assert not np.array_equal(other[0], shuffled[0])


def test_shuffled_rows_are_rows_of_the_batch():
  ids = HASHING.hash(TOKENS)
  shuffled = shuffle_row_ids(jax.random.key(0), ids)
  assert lookup_rows(TABLES, shuffled).rows[0].shape == (2, 6, 4, 5)
  before, after = (
    np.sort(np.asarray(x[3]).reshape(12, 4), axis=0) for x in (ids, shuffled)
  )
  np.testing.assert_array_equal(before, after)


def test_refusals():
  with pytest.raises(InputError, match=r"tables: \[0\]; valid: .*\[0, 3\]"):
    require_tables({0: TABLES[0]}, HASHING.num_rows)
  short = TABLES | {3: TABLES[3][:-2]}
  with pytest.raises(InputError, match=r"tables\[3\].shape\[0\]: "):
    require_tables(short, HASHING.num_rows)
  with pytest.raises(InputError, match=r"row_ids: .*1.* positions"):
    shuffle_row_ids(jax.random.key(0), {0: jnp.zeros((1, 1, 4), jnp.int32)})
