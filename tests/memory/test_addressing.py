"""The controls of the memory: one row for all, and the rows of others."""

import chex
import jax
import numpy as np
import pytest

from engram_jax.config import EngramConfig
from engram_jax.errors import InputError
from engram_jax.memory.lookup import shuffle_row_ids
from engram_jax.memory.memory import Memory

TOKENS = np.random.default_rng(0).integers(0, 40, (3, 8)).astype(np.int32)
BREAKS = np.zeros((3, 8), np.int8)
BREAKS[:, 0] = 1


def memory_of(addressing: str) -> Memory:
  config = EngramConfig(
    hidden_size=8,
    layers=(2, 0),
    rows_per_head=(50, 60),
    heads=2,
    head_dim=4,
    addressing=addressing,
  )
  return Memory.create(config, vocab_size=40)


@pytest.fixture(scope="module")
def ngrams():
  return memory_of("ngrams").row_ids_numpy(TOKENS, breaks=BREAKS)


@pytest.mark.parametrize("addressing", ["ngrams", "one_row", "shuffled"])
def test_the_host_and_a_program_read_the_same_rows(addressing):
  memory = memory_of(addressing)
  on_host = memory.row_ids_numpy(TOKENS, breaks=BREAKS)
  assert all(type(ids) is np.ndarray for ids in on_host.values())
  assert all(ids.dtype == np.int64 for ids in on_host.values())
  found = jax.jit(lambda x: memory.row_ids(x, breaks=BREAKS))(TOKENS)
  chex.assert_trees_all_equal(found, jax.tree.map(np.int32, on_host))
  rows = memory.lookup(memory.init_tables(jax.random.key(0)), TOKENS)
  assert rows.rows[2].shape == (3, 8, 4, 4)


def test_one_row_is_the_first_of_each_head():
  memory = memory_of("one_row")
  for layer, ids in memory.row_ids_numpy(TOKENS).items():
    distinct = np.unique(ids.reshape(-1, 4), axis=0)
    offsets = memory.hashing.head_offsets(layer)
    np.testing.assert_array_equal(distinct, offsets[None])


def test_shuffled_rows_are_those_of_other_positions(ngrams):
  found = memory_of("shuffled").row_ids_numpy(TOKENS, breaks=BREAKS)
  for layer, ids in found.items():
    ours, theirs = ids.reshape(24, 4), ngrams[layer].reshape(24, 4)
    one, other = (sorted(map(tuple, x.tolist())) for x in (ours, theirs))
    assert one == other
    assert np.mean((ours == theirs).all(axis=1)) < 0.2
  # An evaluation that shuffles besides does not put them back in place.
  twice = shuffle_row_ids(jax.random.key(0), found)
  assert np.mean((twice[2] == ngrams[2]).all(axis=-1)) < 0.2


def test_a_single_position_has_no_other():
  with pytest.raises(InputError, match=r"^row_ids: \[1\] positions"):
    memory_of("shuffled").row_ids(TOKENS[:1, :1])


def test_unknown_words_are_refused():
  with pytest.raises(InputError, match=r"^addressing: rows; valid: one of "):
    memory_of("rows")
