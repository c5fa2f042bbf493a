"""A grown memory reads what it read before, and has room to learn more."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax import EngramConfig, InputError, Memory
from engram_jax.memory.growth import add_orders, multiply_rows

CONFIG = EngramConfig(
  hidden_size=8,
  layers=(2, 0),
  rows_per_head=(50, 60),
  heads=2,
  head_dim=4,
  table_init_std=0.5,
)
VOCAB = 40
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (3, 50)).astype(np.int32)
BREAKS = (np.random.default_rng(1).random((3, 50)) < 0.1).astype(np.int8)


@pytest.fixture(scope="module")
def memory():
  return Memory.create(CONFIG, vocab_size=VOCAB)


@pytest.fixture(scope="module")
def tables(memory):
  return memory.init_tables(jax.random.key(0))


def test_more_rows_read_the_same_to_the_bit(memory, tables):
  factor = 3
  larger, grown = multiply_rows(memory, tables, factor=factor)
  for layer, rows in memory.num_rows.items():
    assert larger.num_rows[layer] == factor * rows == len(grown[layer])
  assert larger.config.rows_per_head == (factor * 50, factor * 60)
  old = memory.lookup(tables, TOKENS, breaks=BREAKS)
  new = larger.lookup(grown, TOKENS, breaks=BREAKS)
  chex.assert_trees_all_equal(old.rows, new.rows)
  chex.assert_trees_all_equal(
    jax.tree.map(np.int64, new.row_ids),
    larger.row_ids_numpy(TOKENS, breaks=BREAKS),
  )
  # N-grams that shared a row have parted.
  for layer in memory.layers:
    distinct = [len(np.unique(x.row_ids[layer])) for x in (old, new)]
    assert distinct[1] > 1.3 * distinct[0], layer


def test_padding_of_a_mesh_is_left_behind(memory, tables):
  padded = {i: jnp.pad(t, ((0, 5), (0, 0))) for i, t in tables.items()}
  for grow in (
    lambda tables: multiply_rows(memory, tables, factor=3),
    lambda tables: add_orders(memory, tables, rows_per_head=(30,)),
  ):
    chex.assert_trees_all_equal(grow(padded).tables, grow(tables).tables)


def test_new_orders_stand_behind_the_old_columns(memory, tables):
  larger, grown = add_orders(memory, tables, rows_per_head=(30, 70))
  assert larger.config.max_order == 5 and larger.config.columns == 8
  assert larger.config.dilation == memory.config.dilation == 3
  old = memory.lookup(tables, TOKENS, breaks=BREAKS)
  new = larger.lookup(grown, TOKENS, breaks=BREAKS)
  every = [int(p) for sizes in larger.hashing.primes.values() for p in sizes]
  assert len(set(every)) == len(every), "no prime is used twice"
  for layer, rows in memory.num_rows.items():
    chex.assert_trees_all_equal(old.row_ids[layer], new.row_ids[layer][..., :4])
    chex.assert_trees_all_equal(old.rows[layer], new.rows[layer][..., :4, :])
    assert not new.rows[layer][..., 4:, :].any()
    assert int(new.row_ids[layer][..., 4:].min()) >= rows
  # The new columns tell contexts apart that the old ones could not.
  contexts = np.array([[1, 2, 3, 4, 5], [9, 8, 3, 4, 5]])
  ids = larger.row_ids_numpy(contexts)[0][:, -1]
  same = ids[0] == ids[1]
  assert same[:4].all() and not same[4:].all()


def test_it_has_the_multipliers_of_a_memory_made_so(memory, tables):
  larger, _ = add_orders(memory, tables, rows_per_head=(30,))
  made = Memory.create(larger.config, vocab_size=VOCAB)
  for layer in memory.layers:
    np.testing.assert_array_equal(
      larger.hashing.multipliers[layer], made.hashing.multipliers[layer]
    )


def test_a_grown_memory_is_saved_and_grows_again(memory, tables, tmp_path):
  grown = add_orders(memory, tables, rows_per_head=(30,))
  grown = multiply_rows(*grown, factor=3)
  grown.memory.save(tmp_path / "memory.npz")
  assert Memory.load(tmp_path / "memory.npz") == grown.memory
  old = memory.lookup(tables, TOKENS)
  new = grown.memory.lookup(grown.tables, TOKENS)
  for layer in memory.layers:
    chex.assert_trees_all_equal(old.rows[layer], new.rows[layer][..., :4, :])


def test_bad_growth_is_refused(memory, tables):
  with pytest.raises(InputError, match="factor: 1"):
    multiply_rows(memory, tables, factor=1)
  with pytest.raises(InputError, match="less than 2\\*\\*31 rows"):
    multiply_rows(memory, tables, factor=2**30)
  with pytest.raises(InputError, match="tables"):
    multiply_rows(memory, {}, factor=2)
  for rows in ((), (1,)):
    with pytest.raises(InputError, match="rows_per_head"):
      add_orders(memory, tables, rows_per_head=rows)
