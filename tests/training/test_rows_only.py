"""Rows are taught, and nothing else moves."""

import dataclasses

import chex
import jax
import numpy as np
import optax
import pytest

from engram_jax.errors import InputError
from engram_jax.memory.row_sparse import row_sparse
from engram_jax.training.rows_only import (
  RowsState,
  make_rows_only_step,
  touched_rows,
)

ROW_TX = row_sparse(optax.scale_by_adam())


@pytest.fixture(scope="module")
def parts(tiny, make_batch):
  """The memory, a model, its tables and a batch."""
  state = tiny.state()
  model = tiny.setup.merge_model(state)
  return tiny.setup.memory, model, state.tables, make_batch()


def moved(before, after):
  """Ids of the rows that differ."""
  return np.flatnonzero(np.any(np.asarray(before) != np.asarray(after), axis=1))


def test_rows_learn_and_all_else_stays(parts):
  memory, model, tables, batch = parts
  was = jax.tree.map(np.array, (tables, jax.tree.leaves(model)))
  state = RowsState.create(memory, tables, ROW_TX)
  step = make_rows_only_step(memory, ROW_TX, learning_rate=0.1)
  losses = []
  for _ in range(30):
    state, loss = step(state, model, batch)
    losses.append(float(loss))
  assert losses[-1] < losses[0] - 0.5
  chex.assert_trees_all_equal(was, (tables, jax.tree.leaves(model)))
  touched = touched_rows(memory, [batch])
  assert 0 < len(touched[0]) < len(tables[0])
  np.testing.assert_array_equal(moved(tables[0], state.tables[0]), touched[0])


def test_masks_choose_positions_and_columns(parts):
  memory, model, tables, batch = parts
  mask = np.zeros(batch["inputs"].shape, bool)
  mask[:, 5] = True
  batch = batch | {"row_mask": mask}
  columns = (False, True)
  step = make_rows_only_step(memory, ROW_TX, learning_rate=0.1, columns=columns)
  state = RowsState.create(memory, tables, ROW_TX)
  state, _ = step(state, model, batch)
  ids = memory.row_ids_numpy(batch["inputs"], breaks=batch["breaks"])[0]
  expected = np.unique(ids[:, 5, 1])
  chex.assert_trees_all_equal(
    touched_rows(memory, [batch], columns=columns), {0: expected}
  )
  # A row that no target sees has no gradient.
  found = moved(tables[0], state.tables[0])
  assert len(found) and set(found) <= set(expected)


def test_a_wrong_number_of_columns_is_refused(parts):
  memory, _, _, batch = parts
  with pytest.raises(InputError, match="columns"):
    touched_rows(memory, [batch], columns=(True,))


def test_experts_take_every_token(tiny, parts):
  """An edit must not depend on what else is in the batch."""
  memory, _, tables, batch = parts
  moe = dataclasses.replace(
    tiny.setup.model.moe, dispatch="bucketed", capacity_factor=0.1
  )
  bucketed = dataclasses.replace(tiny.setup.model, moe=moe)
  state = tiny.state()
  losses = []
  for config in (tiny.setup.model, bucketed):
    model = tiny.setup.merge_model(state)
    model.config = config
    rows = RowsState.create(memory, tables, ROW_TX)
    step = make_rows_only_step(memory, ROW_TX, learning_rate=0.1)
    losses.append(float(step(rows, model, batch)[1]))
  np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)
