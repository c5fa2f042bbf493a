"""Tests of the hidden states at every depth."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.analysis.hidden_states import hidden_states
from engram_jax.backbone.transformer import Context, document_layout


def rows_of(probed):
  batch = probed.batch
  found = probed.memory.lookup(
    probed.tables, batch["inputs"], breaks=batch["breaks"]
  )
  return found.rows


def by_hand(probed, rows):
  """A loop over the blocks one by one."""
  model, batch = probed.model, probed.batch
  breaks, config = batch["breaks"], model.config
  context = Context(*document_layout(breaks), "dense")
  stacks = [nnx.split(model.dense_blocks), nnx.split(model.moe_blocks)]
  streams = model.embed(batch["inputs"])
  states = [streams.sum(axis=2)]
  for i in range(config.num_layers):
    if rows is not None and i in config.engram.layers:
      engram = model.engrams[config.engram.layers.index(i)]
      streams += engram.fuse(streams, rows[i], breaks=breaks).update
    dense = config.num_dense_layers
    graph, stack = stacks[i >= dense]
    pick = operator.itemgetter(i - dense if i >= dense else i)
    block = nnx.merge(graph, jax.tree.map(pick, stack))
    streams = block(streams, context).streams
    states.append(streams.sum(axis=2))
  return jnp.stack(states)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("streams", [1, 2])
def test_they_are_those_of_a_loop_over_the_blocks(make_probed, scan, streams):
  probed = make_probed(scan_blocks=scan, streams=streams, num_layers=4)
  inputs, breaks = probed.batch["inputs"], probed.batch["breaks"]

  @nnx.jit
  def both(model, rows):
    found = hidden_states(model, rows, inputs, breaks=breaks)
    output = model(inputs, rows, breaks=breaks, dispatch="dense")
    return found, model.norm(found[-1]), output.hidden

  rows = rows_of(probed)
  for given in (rows, None):
    found, last, hidden = both(probed.model, given)
    assert found.shape == (5, *inputs.shape, 8)
    expected = by_hand(probed, given)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(last, hidden, rtol=1e-5, atol=1e-5)


def test_any_function_is_called_after_every_block(probed):
  inputs = probed.batch["inputs"]

  @nnx.jit
  def forward(model):
    def observe(streams):
      return {"mean": streams.mean(), "first": streams[:, 0]}

    return (
      model(inputs, None, observe=observe),
      model(inputs, None),
    )

  seen, plain = forward(probed.model)
  assert plain.observed is None
  assert seen.observed["mean"].shape == (3,)
  assert seen.observed["first"].shape == (3, 2, 1, 8)
  np.testing.assert_array_equal(seen.logits, plain.logits)
