"""Retrieval of all layers at once, its shuffled control, its refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.errors import InputError
from engram_jax.memory.hashing import NgramHash
from engram_jax.memory.retrieval import read_rows, retrieve, shuffle_row_ids

HASHING = NgramHash.create(
  vocab_size=50, rows_per_head=(30, 40), heads=2, layers=(3, 0), pad_id=2
)
# One more row than the hash needs, as a table padded for sharding has.
TABLES = {
  layer: jax.random.normal(jax.random.key(layer), (rows + 1, 5))
  for layer, rows in HASHING.num_rows.items()
}
TOKENS = jax.random.randint(jax.random.key(7), (2, 6), 0, 50)


def test_rows_are_those_of_the_hash():
  found = jax.jit(lambda t, c: retrieve(t, HASHING, c))(TABLES, TOKENS)
  assert set(found.rows) == set(found.row_ids) == {0, 3}
  for layer in HASHING.layers:
    ids = HASHING.row_ids_numpy(np.asarray(TOKENS), layer)
    np.testing.assert_array_equal(found.row_ids[layer], ids)
    rows = np.asarray(TABLES[layer])[ids]
    np.testing.assert_array_equal(found.rows[layer], rows)


def test_history_and_breaks_reach_the_hash():
  whole = retrieve(TABLES, HASHING, TOKENS).row_ids
  history = HASHING.next_history(TOKENS[:, :4])
  rest = retrieve(TABLES, HASHING, TOKENS[:, 4:], history=history).row_ids
  starts = jnp.zeros((2, 6), jnp.int8).at[:, 4].set(1)
  packed = retrieve(TABLES, HASHING, TOKENS, breaks=starts).row_ids
  alone = retrieve(TABLES, HASHING, TOKENS[:, 4:]).row_ids
  for layer in HASHING.layers:
    np.testing.assert_array_equal(rest[layer], whole[layer][:, 4:])
    np.testing.assert_array_equal(packed[layer][:, 4:], alone[layer])


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
  ids = retrieve(TABLES, HASHING, TOKENS).row_ids
  shuffled = shuffle_row_ids(jax.random.key(0), ids)
  assert read_rows(TABLES, shuffled)[0].shape == (2, 6, 4, 5)
  before, after = (
    np.sort(np.asarray(x[3]).reshape(12, 4), axis=0) for x in (ids, shuffled)
  )
  np.testing.assert_array_equal(before, after)


def test_refusals():
  with pytest.raises(InputError, match=r"tables: \[0\]; valid: .*\[0, 3\]"):
    retrieve({0: TABLES[0]}, HASHING, TOKENS)
  short = TABLES | {3: TABLES[3][:-2]}
  with pytest.raises(InputError, match=r"tables\[3\].shape\[0\]: "):
    retrieve(short, HASHING, TOKENS)
  with pytest.raises(InputError, match=r"row_ids: .*1.* positions"):
    shuffle_row_ids(jax.random.key(0), {0: jnp.zeros((1, 1, 4), jnp.int32)})
