"""Low-rank additions: nothing at first, of the rank that was asked for."""

import chex
import jax
import numpy as np
import optax
import pytest
from flax import nnx

from engram_jax.errors import InputError
from engram_jax.training.lora import (
  Factors,
  count_lora,
  init_lora,
  make_lora_step,
  merge_lora,
)
from engram_jax.training.state import flatten

#: One of each kind: sides of several axes, a stack of experts, a stack of
#: outputs between rows and columns.
MATRICES = {
  "moe_blocks/attention/query": (slice(None), (8, 2 * 6)),
  "moe_blocks/attention/out": (slice(None), (2 * 6, 8)),
  "moe_blocks/ffn/up": (slice(None), (8, 8)),
}


@pytest.fixture(scope="module")
def model(tiny):
  return tiny.setup.merge_model(tiny.state())


def parameters(model):
  return {
    name: np.asarray(leaf)
    for name, leaf in flatten(nnx.state(model, nnx.Param)).items()
  }


@pytest.fixture(scope="module")
def lora(model):
  return init_lora(jax.random.key(0), model, rank=2, matrices=[*MATRICES])


def loud(lora):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: rng.normal(size=x.shape).astype("f4"), lora)


def test_new_factors_add_nothing(model, lora):
  merged = parameters(merge_lora(model, lora))
  chex.assert_trees_all_equal(merged, parameters(model))
  assert sorted(lora) == sorted(MATRICES)


def test_additions_are_products_of_the_rank(model, lora):
  before = parameters(model)
  after = parameters(merge_lora(model, loud(lora), scale=0.5))
  double = parameters(merge_lora(model, loud(lora)))
  for name, value in after.items():
    change = value - before[name]
    if name not in MATRICES:
      assert not change.any(), name
      continue
    np.testing.assert_allclose(
      double[name] - before[name], 2 * change, atol=1e-5, err_msg=name
    )
    _, shape = MATRICES[name]
    for matrix in change.reshape(-1, *shape):
      singular = np.linalg.svd(matrix, compute_uv=False)
      assert singular[1] > 0.1 and singular[2] < 1e-5, name


def test_the_engram_projections_are_matrices_too(model):
  name = "engrams/0/projection"
  lora = init_lora(jax.random.key(0), model, rank=1, matrices=[name])
  before = parameters(model)[name]
  change = parameters(merge_lora(model, loud(lora)))[name] - before
  for output in range(change.shape[1]):
    assert np.linalg.matrix_rank(change[:, output], tol=1e-5) == 1


def test_the_count_is_that_of_the_factors(model, lora):
  # Query 8 x 12, out 12 x 8, four experts of 8 x 8; one block; rank 2.
  assert count_lora(lora) == 2 * (20 + 20 + 4 * 16)
  once = init_lora(jax.random.key(0), model, rank=1, matrices=[*MATRICES])
  assert count_lora(lora) == 2 * count_lora(once)


def test_factors_learn_and_the_model_stays(tiny, model, lora, make_batch):
  tables, batch = tiny.state().tables, make_batch()
  was = parameters(model)
  optimizer = optax.adam(0.05)
  step = make_lora_step(tiny.setup.memory, optimizer)
  opt_state, losses = optimizer.init(lora), []
  for _ in range(30):
    lora, opt_state, loss = step(lora, opt_state, model, tables, batch)
    losses.append(float(loss))
  assert losses[-1] < losses[0] - 0.3
  chex.assert_trees_all_equal(was, parameters(model))
  assert all(isinstance(factors, Factors) for factors in lora.values())


def test_bad_choices_are_refused(model):
  key = jax.random.key(0)
  with pytest.raises(InputError, match="rank"):
    init_lora(key, model, rank=0)
  with pytest.raises(InputError, match="matrices: \\*/nothing"):
    init_lora(key, model, rank=1, matrices=["*/nothing"])
  with pytest.raises(InputError, match="only matrices"):
    init_lora(key, model, rank=1, matrices=["norm/scale"])
