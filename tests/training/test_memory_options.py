"""A step and a loss with every option of the memory, from its definition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.config import EngramConfig
from engram_jax.memory.lookup import shuffle_row_ids
from engram_jax.stores.program_stores import TableStore
from engram_jax.training.evaluation import batch_losses
from engram_jax.training.losses import cross_entropy
from engram_jax.training.step import make_train_step

BASE = EngramConfig(
  hidden_size=8, layers=(0,), rows_per_head=(150, 150), heads=1, head_dim=4
)
OPTIONS = {
  "one row": dict(addressing="one_row"),
  "shuffled": dict(addressing="shuffled"),
  "unigrams": dict(smallest_order=1, rows_per_head=(150,)),
  "no gate": dict(gate=False),
  "input average": dict(fusion="input_average", short_conv=False),
}


@pytest.fixture(scope="module", params=OPTIONS)
def tiny(request, make_tiny):
  engram = dataclasses.replace(BASE, **OPTIONS[request.param])
  return make_tiny(model={"engram": engram})


def rows_by_hand(setup, batch):
  """int [B, L, K] of layer 0, with nothing of what is tested."""
  memory, config = setup.memory, setup.model.engram
  canonical = np.asarray(memory.compression(np.asarray(batch["inputs"])))
  ids = memory.hashing.row_ids_numpy(
    canonical, 0, breaks=np.asarray(batch["breaks"])
  )
  if config.addressing == "one_row":
    return np.broadcast_to(memory.hashing.head_offsets(0), ids.shape)
  if config.addressing == "shuffled":
    return shuffle_row_ids(jax.random.key(1), {0: ids})[0]
  if config.smallest_order == 1:
    multiplier = int(memory.hashing.multipliers[0][0])
    return (
      canonical[..., None].astype(int) * multiplier % (memory.hashing.primes[0])
    )
  return ids


def test_a_step_moves_the_rows_that_are_read(tiny, make_batch):
  batch = make_batch()
  state = tiny.state()
  before = np.array(state.tables[0])
  after, metrics = make_train_step(tiny.setup)(state, batch)
  assert np.isfinite(metrics["loss"])
  moved = (np.asarray(after.tables[0]) != before).any(axis=1)
  read = np.unique(rows_by_hand(tiny.setup, batch))
  # A row that only a position without a target has read has no gradient.
  assert set(np.flatnonzero(moved)) <= set(read.tolist())
  assert moved.sum() >= 0.8 * len(read)


@pytest.mark.parametrize("home", ["tables", "host"])
def test_the_loss_is_that_of_these_rows(tiny, make_batch, home):
  batch, state = make_batch(1), tiny.state(1)
  model = tiny.setup.merge_model(state)
  rows = {0: state.tables[0][jnp.asarray(rows_by_hand(tiny.setup, batch))]}
  out = model(batch["inputs"], rows, breaks=batch["breaks"])
  expected = cross_entropy(out.logits, batch["targets"], batch["loss_mask"])
  store = TableStore(state.tables)
  if home == "host":
    store = tiny.setup.memory.open_store("host", state.tables)
  ((loss, _),) = batch_losses(tiny.setup, model, store, [batch])
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
