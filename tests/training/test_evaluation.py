"""Tests of the loss of a text, with and without its memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.errors import InputError
from engram_jax.memory.homes import open_store
from engram_jax.training.evaluation import (
  MEMORY_MODES,
  losses_by_memory,
  make_eval_step,
  mean_loss,
  mean_loss_from_store,
)
from engram_jax.training.losses import cross_entropy
from engram_jax.training.state import flatten


@pytest.fixture(scope="module")
def batch(make_batch):
  return make_batch()


@pytest.fixture(scope="module")
def weights(tiny):
  """Model and tables."""
  state = tiny.state()
  return tiny.program.model_of(state), state.tables


@pytest.fixture(scope="module")
def steps(tiny):
  return {m: make_eval_step(tiny.program, memory=m) for m in MEMORY_MODES}


@pytest.fixture(scope="module")
def losses(steps, weights, batch):
  return {mode: step(*weights, batch)[0] for mode, step in steps.items()}


def test_it_is_the_loss_of_the_model(tiny, steps, weights, losses, batch):
  program = tiny.program

  @jax.jit
  def expected(model, tables, batch):
    canonical = program.compression(batch["inputs"])
    row_ids = program.hashing.hash(canonical, breaks=batch["breaks"])
    rows = {i: tables[i][ids] for i, ids in row_ids.items()}
    found = {}
    for mode, given in (("on", rows), ("off", None)):
      out = model(batch["inputs"], given, breaks=batch["breaks"])
      targets, mask = batch["targets"], batch["loss_mask"]
      found[mode] = cross_entropy(out.logits, targets, mask)
    return found

  for mode, loss in expected(*weights, batch).items():
    np.testing.assert_allclose(losses[mode], loss, rtol=1e-5)
  assert len({float(x) for x in losses.values()}) == 3
  for step in steps.values():
    assert step(*weights, batch)[1] == batch["loss_mask"].sum()


def test_without_memory_no_table_is_read(steps, weights, losses, batch):
  model, tables = weights
  broken = {i: x * jnp.nan for i, x in tables.items()}
  assert steps["off"](model, broken, batch)[0] == losses["off"]
  for mode in ("on", "shuffled"):
    assert jnp.isnan(steps[mode](model, broken, batch)[0])


def test_shuffled_rows_are_rows_of_the_table(steps, weights, batch):
  model, tables = weights
  # With every row alike it does not matter which one is read.
  alike = {i: jnp.broadcast_to(x[:1], x.shape) for i, x in tables.items()}
  on, shuffled = (
    steps[mode](model, alike, batch)[0] for mode in ("on", "shuffled")
  )
  np.testing.assert_allclose(on, shuffled, rtol=1e-6)


def test_no_assignment_is_dropped(make_tiny, tiny, weights, losses, batch):
  tight = dataclasses.replace(
    tiny.program.model.moe, dispatch="bucketed", capacity_factor=0.1
  )
  bucketed = make_tiny(model={"moe": tight}).program
  model = bucketed.model_of(tiny.state())
  total, _ = make_eval_step(bucketed)(model, weights[1], batch)
  np.testing.assert_allclose(total, losses["on"], rtol=1e-6)


def test_nothing_is_donated(steps, weights, batch):
  model, tables = weights
  steps["on"](model, tables, batch)
  assert not any(x.is_deleted() for x in tables.values())
  assert not any(x.is_deleted() for x in flatten(model).values())


def test_every_target_counts_once(steps, weights, batch):
  # The second batch has fewer targets, and then less weight.
  fewer = batch | {"loss_mask": batch["loss_mask"].at[1:].set(False)}
  none = batch | {"loss_mask": jnp.zeros_like(batch["loss_mask"])}
  pairs = [steps["on"](*weights, b) for b in (batch, fewer)]
  expected = sum(float(s) for s, _ in pairs) / sum(int(n) for _, n in pairs)
  found = mean_loss(steps["on"], *weights, [batch, none, fewer])
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  for empty in ([], [none]):
    with pytest.raises(InputError, match=r"^batches: no target; valid: at lea"):
      mean_loss(steps["on"], *weights, empty)


@pytest.mark.parametrize("prefetch", [True, False])
def test_a_store_gives_the_losses_of_the_tables(
  tiny, weights, losses, batch, prefetch
):
  program, (model, tables) = tiny.program, weights
  store = open_store("host", tables, program.hashing)
  fewer = batch | {"loss_mask": batch["loss_mask"].at[1:].set(False)}
  expected = losses_by_memory(program, *weights, lambda: [batch, fewer])
  found = losses_by_memory(
    program,
    model,
    {},
    lambda: [batch, fewer],
    store=store,
    prefetch=prefetch,
  )
  assert found == expected
  assert list(found) == list(MEMORY_MODES)
  assert store.statistics.reads == 4


def test_a_store_that_does_not_fit_is_refused(tiny, make_tiny, weights):
  program, (model, tables) = tiny.program, weights
  store = open_store("host", tables, program.hashing)
  with pytest.raises(InputError, match=r"^memory: off; valid: on or shuffled"):
    mean_loss_from_store(program, model, store, [], memory="off")
  plain = make_tiny(memory=False).program
  with pytest.raises(InputError, match=r"^store: HostStore; valid: None witho"):
    mean_loss_from_store(plain, model, store, [])


def test_an_unknown_use_of_the_memory_is_refused(tiny):
  with pytest.raises(InputError, match=r"^memory: none; valid: one of on, off"):
    make_eval_step(tiny.program, memory="none")
