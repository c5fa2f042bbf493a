"""Tests of a run's state and of the names of its arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.config_dicts import to_dict
from engram_jax.training.run_metadata import require_same_run
from engram_jax.training.state import (
  abstract_model,
  count_parameters,
  flatten,
  unflatten,
)


def initial(tiny):
  """A new run's state."""
  return jax.jit(tiny.setup.initial_state)(
    jax.random.key(tiny.setup.train.seed)
  )


@pytest.fixture(scope="module")
def state(tiny):
  return initial(tiny)


def test_a_new_run_starts_at_zero(state, tiny):
  leaves = flatten(state)
  assert leaves["step"].dtype == jnp.int32 and int(leaves["step"]) == 0
  for name, leaf in leaves.items():
    if name.startswith(("balance/", "opt_state/", "table_states/")):
      assert not np.asarray(leaf).any(), name
    if name.startswith("params/"):
      assert leaf.dtype == jnp.float32, name
  memory = tiny.setup.memory
  assert list(state.tables) == [0]
  assert state.tables[0].shape == (memory.num_rows[0], memory.config.head_dim)
  np.testing.assert_allclose(
    np.std(state.tables[0]), memory.config.table_init_std, rtol=0.1
  )


def test_shapes_are_known_without_allocating(state, tiny):
  abstract = tiny.abstract_state()
  assert jax.tree.structure(abstract) == jax.tree.structure(state)
  for name, leaf in flatten(abstract).items():
    made = flatten(state)[name]
    assert isinstance(leaf, jax.ShapeDtypeStruct)
    assert (leaf.shape, leaf.dtype) == (made.shape, made.dtype), name
  _, params, balance = abstract_model(tiny.setup.model)
  for mine, its in ((params, state.params), (balance, state.balance)):
    assert jax.tree.structure(mine) == jax.tree.structure(its)


def test_the_seed_decides(state, make_tiny):
  other = initial(make_tiny(seed=1))
  mine, its = flatten(state), flatten(other)
  for name in ("params/embedding/table", "tables/0"):
    assert not np.array_equal(mine[name], its[name])


def test_with_and_without_memory_start_alike(state, make_tiny):
  plain = flatten(initial(make_tiny(memory=False)).params)
  with_memory = flatten(state.params)
  rest = {n: x for n, x in with_memory.items() if not n.startswith("engrams/")}
  assert plain.keys() == rest.keys()
  differing = [n for n in plain if not np.array_equal(plain[n], rest[n])]
  assert differing == []


def test_names_are_those_of_the_model(state):
  leaves = flatten(state)
  # One name for each leaf: none hides another.
  assert len(leaves) == len(jax.tree.leaves(state))
  expected = """
    balance/moe_blocks/ffn/bias
    opt_state/0/count
    opt_state/0/mu/engrams/0/projection
    opt_state/0/nu/embedding/table
    params/embedding/table
    params/engrams/0/projection
    params/moe_blocks/attention/kv_norm/scale
    params/moe_blocks/ffn/shared/gate
    params/norm/scale
    step
    table_states/0/mu
    tables/0
  """.split()
  assert set(expected) <= set(leaves)
  assert not any("value" in name.split("/") for name in leaves)


def test_no_name_tells_where_the_memory_sits(tiny):
  # Nor does a shape: a checkpoint can be read with the Engram layers moved.
  found = []
  for layers in ((0, 3), (2, 1)):
    model = tiny.setup.model
    engram = dataclasses.replace(model.engram, layers=layers)
    config = dataclasses.replace(model, num_layers=12, engram=engram)
    _, params, balance = abstract_model(config)
    assert flatten(balance)["moe_blocks/ffn/bias"].shape == (12, 4)
    found.append({name: x.shape for name, x in flatten(params).items()})
  assert found[0] == found[1]


def test_how_blocks_are_compiled_is_not_in_the_state(tiny, state):
  # So one run's checkpoints serve however it is continued.
  model = dataclasses.replace(tiny.setup.model, scan_blocks=True, remat="block")
  _, params, balance = abstract_model(model)
  for mine, its in ((params, state.params), (balance, state.balance)):
    mine, its = flatten(mine), flatten(its)
    assert list(mine) == list(its)
    assert all(mine[name].shape == its[name].shape for name in its)
  before = {"config": {"model": to_dict(tiny.setup.model)}}
  require_same_run(before, {"config": {"model": to_dict(model)}})


def test_unflatten_takes_flatten_back(state, tiny):
  template = tiny.abstract_state()
  shuffled = dict(reversed(flatten(state).items()))
  back = unflatten(template, shuffled)
  assert jax.tree.structure(back) == jax.tree.structure(state)
  for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(state)):
    assert one is other


def test_parameters_are_counted(state):
  leaves = flatten(state.params)
  expected = sum(int(np.prod(x.shape)) for x in leaves.values())
  assert count_parameters(state.params) == expected
  assert count_parameters({"a": jnp.zeros((2, 3)), "b": jnp.zeros(())}) == 7
