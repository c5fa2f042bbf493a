"""Tests of which optimizer moves what, and how far."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from engram_jax.errors import InputError
from engram_jax.memory.row_sparse import RowGradients
from engram_jax.parameters import param
from engram_jax.run_config import TABLE_OPTIMIZERS, TrainConfig
from engram_jax.training.optimizers import (
  backbone_optimizer,
  decay_mask,
  table_optimizer,
)
from engram_jax.training.state import flatten


def config(**changes) -> TrainConfig:
  return TrainConfig(steps=10, batch_size=4, seq_len=8, **changes)


def test_every_matrix_and_nothing_else_decays(tiny):
  params = tiny.abstract_state().params
  mask = flatten(decay_mask(params))
  assert mask.keys() == flatten(params).keys()
  spared = {name for name, decays in mask.items() if not decays}
  assert spared == {
    "moe_blocks/attention/kv_norm/scale",
    "moe_blocks/attention_norm/scale",
    "engrams/0/conv_scale",
    "engrams/0/projection_bias",
    "engrams/0/key_scale",
    "engrams/0/query_scale",
    "moe_blocks/ffn_norm/scale",
    "norm/scale",
  }
  for name in ("conv_kernel", "projection"):
    assert mask[f"engrams/0/{name}"]
  assert mask["moe_blocks/ffn/router"] and mask["embedding/table"]


def test_adamw_for_a_learning_rate_of_one():
  rng = np.random.default_rng(0)
  names = ("kernel", "bias", "key_scale")
  values = {name: rng.normal(size=(4, 3)) for name in names}
  gradients = {name: rng.normal(size=(4, 3)) for name in names}

  def state_of(arrays):
    return nnx.State(
      {
        k: param(
          jnp.asarray(v, jnp.float32), axes=("a", "b"), decay=k == "kernel"
        )
        for k, v in arrays.items()
      }
    )

  params = state_of(values)
  optimizer = backbone_optimizer(config(adam_b1=0.8, weight_decay=0.1))
  state = optimizer.init(params)
  mean = variance = 0.0
  for t in (1, 2):
    updates, state = optimizer.update(state_of(gradients), state, params)
    updates = {k: np.asarray(v) for k, v in flatten(updates).items()}
    for name in names:
      # Adam by hand, with the same gradient at both steps.
      g = gradients[name]
      mean = g * (1 - 0.8**t) / (1 - 0.8**t)
      variance = g**2 * (1 - 0.95**t) / (1 - 0.95**t)
      expected = -mean / (np.sqrt(variance) + 1e-8)
      if name == "kernel":
        expected = expected - 0.1 * values[name]
      np.testing.assert_allclose(updates[name], expected, rtol=2e-5)


def test_it_does_not_clip():
  params = nnx.State({"kernel": param(jnp.zeros((2, 2)), axes=("a", "b"))})
  optimizer = backbone_optimizer(config(clip_norm=0.01))
  huge = jax.tree.map(lambda x: jnp.full_like(x, 1e6), params)
  _, state = optimizer.update(huge, optimizer.init(params), params)
  np.testing.assert_allclose(optax.global_norm(state[0].mu), 2e5, rtol=1e-5)


OTHERS = ("rowwise_adagrad", "sinkhorn")


def one_update(name):
  """Table of ones and state after row 3 had the gradient (2, -1)."""
  optimizer = table_optimizer(
    config(
      adam_b1=0.5,
      adam_b2=0.9,
      adam_eps=1e-3,
      weight_decay=0.5,
      table_optimizer=name,
    )
  )
  table = jnp.ones((5, 2))
  gradients = RowGradients(
    jnp.array([3, 5], jnp.int32), jnp.array([[2.0, -1.0], [0.0, 0.0]])
  )
  moved, state = optimizer.update(table, optimizer.init(table), gradients, 0.1)
  return moved, state


@pytest.mark.parametrize(
  "name", [n for n in TABLE_OPTIMIZERS if n not in OTHERS]
)
def test_tables_take_adam_s_numbers_and_no_decay(name):
  moved, state = one_update(name)
  expected = np.ones((5, 2), np.float32)
  expected[3] -= 0.1 * np.array([2.0 / 2.001, -1.0 / 1.001], np.float32)
  np.testing.assert_allclose(moved, expected, rtol=1e-6)
  np.testing.assert_allclose(state.mu[3], [1.0, -0.5])
  np.testing.assert_allclose(state.nu[3], [0.4, 0.1], rtol=1e-6)
  per_row = name == "lazy_adam_row_steps"
  assert state.count.shape == ((5,) if per_row else ())


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_optimizers_of_tables_keep_their_own_constants(name):
  moved, state = one_update(name)
  expected = np.ones((5, 2), np.float32)
  if name == "rowwise_adagrad":
    expected[3] -= 0.1 * np.array([2.0, -1.0]) / np.sqrt(2.5)
    np.testing.assert_allclose(state.accumulator, [0, 0, 0, 2.5, 0])
  else:
    # One row alone: balanced, its entries are all as long.
    expected[3] -= 0.1 * 0.18 * np.array([1.0, -1.0])
    np.testing.assert_allclose(state.momentum[3], [2.0, -1.0])
  np.testing.assert_allclose(moved, expected, rtol=1e-6)


def test_an_unknown_optimizer_is_refused():
  with pytest.raises(InputError, match=r"^table_optimizer: adam; valid: one "):
    config(table_optimizer="adam")
