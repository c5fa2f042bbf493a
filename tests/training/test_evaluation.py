"""Tests of the loss of a text, with and without its memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.errors import InputError
from engram_jax.stores.program_stores import TableStore
from engram_jax.training.evaluation import (
  MEMORY_MODES,
  batch_losses,
  losses_by_memory,
  mean_loss,
)
from engram_jax.training.losses import cross_entropy
from engram_jax.training.state import flatten


@pytest.fixture(scope="module")
def batch(make_batch):
  return make_batch()


@pytest.fixture(scope="module")
def weights(tiny):
  """Model and store of its tables."""
  state = tiny.state()
  return tiny.setup.merge_model(state), TableStore(state.tables)


@pytest.fixture(scope="module")
def steps(tiny):
  """The loss of one batch and its targets, by the use of the memory."""

  def of(memory):
    def step(model, store, batch):
      (pair,) = batch_losses(tiny.setup, model, store, [batch], memory=memory)
      return pair

    return step

  return {memory: of(memory) for memory in MEMORY_MODES}


@pytest.fixture(scope="module")
def losses(steps, weights, batch):
  return {mode: step(*weights, batch)[0] for mode, step in steps.items()}


def test_it_is_the_loss_of_the_model(tiny, steps, weights, losses, batch):
  memory = tiny.setup.memory

  @jax.jit
  def expected(model, tables, batch):
    row_ids = memory.row_ids(batch["inputs"], breaks=batch["breaks"])
    rows = {i: tables[i][ids] for i, ids in row_ids.items()}
    found = {}
    for mode, given in (("on", rows), ("off", None)):
      out = model(batch["inputs"], given, breaks=batch["breaks"])
      targets, mask = batch["targets"], batch["loss_mask"]
      found[mode] = cross_entropy(out.logits, targets, mask)
    return found

  model, store = weights
  for mode, loss in expected(model, store.tables, batch).items():
    np.testing.assert_allclose(losses[mode], loss, rtol=1e-5)
  assert len({float(x) for x in losses.values()}) == 3
  for step in steps.values():
    assert step(*weights, batch)[1] == batch["loss_mask"].sum()


def test_without_memory_no_table_is_read(steps, weights, losses, batch):
  model, store = weights
  broken = jax.tree.map(lambda x: x * jnp.nan, store)
  assert steps["off"](model, broken, batch)[0] == losses["off"]
  for mode in ("on", "shuffled"):
    assert jnp.isnan(steps[mode](model, broken, batch)[0])


def test_shuffled_rows_are_rows_of_the_table(steps, weights, batch):
  model, store = weights
  # With every row alike it does not matter which one is read.
  alike = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), store)
  on, shuffled = (
    steps[mode](model, alike, batch)[0] for mode in ("on", "shuffled")
  )
  np.testing.assert_allclose(on, shuffled, rtol=1e-6)


def test_no_assignment_is_dropped(make_tiny, tiny, weights, losses, batch):
  tight = dataclasses.replace(
    tiny.setup.model.moe, dispatch="bucketed", capacity_factor=0.1
  )
  bucketed = make_tiny(model={"moe": tight}).setup
  model = bucketed.merge_model(tiny.state())
  ((total, _),) = batch_losses(bucketed, model, weights[1], [batch])
  np.testing.assert_allclose(total, losses["on"], rtol=1e-6)


def test_nothing_is_donated(steps, weights, batch):
  model, store = weights
  steps["on"](model, store, batch)
  assert not any(x.is_deleted() for x in store.tables.values())
  assert not any(x.is_deleted() for x in flatten(model).values())


def test_every_target_counts_once(tiny, steps, weights, batch):
  # The second batch has fewer targets, and then less weight.
  fewer = batch | {"loss_mask": batch["loss_mask"].at[1:].set(False)}
  none = batch | {"loss_mask": jnp.zeros_like(batch["loss_mask"])}
  pairs = [steps["on"](*weights, b) for b in (batch, fewer)]
  expected = sum(float(s) for s, _ in pairs) / sum(int(n) for _, n in pairs)
  found = mean_loss(tiny.setup, *weights, [batch, none, fewer])
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  for empty in ([], [none]):
    with pytest.raises(InputError, match=r"^batches: no target; valid: at lea"):
      mean_loss(tiny.setup, *weights, empty)


@pytest.mark.parametrize("prefetch", [True, False])
def test_a_store_gives_the_losses_of_the_tables(
  tiny, weights, losses, batch, prefetch
):
  setup, (model, tables) = tiny.setup, weights
  store = setup.memory.open_store("host", tables.tables)
  fewer = batch | {"loss_mask": batch["loss_mask"].at[1:].set(False)}
  expected = losses_by_memory(setup, *weights, lambda: [batch, fewer])
  found = losses_by_memory(
    setup, model, store, lambda: [batch, fewer], prefetch=prefetch
  )
  assert found == expected
  assert list(found) == list(MEMORY_MODES)
  assert store.statistics.reads == 4


def test_a_store_that_does_not_fit_is_refused(tiny, make_tiny, weights):
  setup, (model, store) = tiny.setup, weights

  def refused(line):
    return pytest.raises(InputError, match=f"^{line}")

  plain = make_tiny(memory=False).setup
  with refused("store: TableStore; valid: None without a memory"):
    mean_loss(plain, model, store, [])
  for memory in ("on", "shuffled"):
    with refused("store: None; valid: the memory's rows"):
      mean_loss(setup, model, None, [], memory=memory)
  other = TableStore({5: store.tables[0]})
  with refused(r"store.layers: \[5\]; valid: rows of the layers \[0\]"):
    mean_loss(setup, model, other, [])
  with refused("memory: none; valid: one of on, off, shuffled"):
    mean_loss(setup, model, store, [], memory="none")


def test_without_memory_no_store_is_asked_for(tiny, losses, weights, batch):
  model, _ = weights
  ((loss, _),) = batch_losses(tiny.setup, model, None, [batch], memory="off")
  assert loss == losses["off"]
