"""Meshes that fit and meshes that do not; on one device there is none."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from engram_jax import sharding
from engram_jax.backbone.layers import VOCABULARY
from engram_jax.config import AttentionConfig, ModelConfig, MoEConfig
from engram_jax.errors import InputError
from engram_jax.parameters import param
from engram_jax.run_config import (
  DataConfig,
  ExperimentConfig,
  MeshConfig,
  TrainConfig,
)
from engram_jax.training.state import TrainState, flatten

EIGHT = [jax.devices()[0]] * 8


@pytest.mark.parametrize(
  ("shape", "message"),
  [
    (
      (3, 1, 1),
      r"^mesh.replica \* mesh.data \* mesh.expert \* mesh.tensor: 3; valid: "
      r"the number of devices, 8; data = 0 takes what is left$",
    ),
    ((8, 2, 1), r"^mesh.replica .* mesh.tensor: 16; valid: .* 8;"),
    (
      (0, 3, 1),
      r"^mesh.replica \* mesh.expert \* mesh.tensor: 3; valid: a divisor of "
      r"the number of devices, 8$",
    ),
    ((0, 4, 4), r"^mesh.replica \* .* \* mesh.tensor: 16; valid: "),
    ((3, 1, 1, 0), r"^mesh.data \* .* mesh.tensor: 3; valid: a divisor of "),
  ],
)
def test_axes_that_do_not_multiply_to_the_devices(shape, message):
  with pytest.raises(InputError, match=message):
    sharding.make_mesh(MeshConfig(*shape), devices=EIGHT)


def test_one_device_has_no_mesh():
  one = jax.devices()[:1]
  assert sharding.make_mesh(MeshConfig(), devices=one) is None
  assert sharding.make_mesh(MeshConfig(1, 1, 1), devices=one) is None
  with pytest.raises(InputError, match=r"^mesh.replica \* .*: 2; valid: .* 1;"):
    sharding.make_mesh(MeshConfig(2, 1, 1), devices=one)
  assert sharding.current_mesh() is None
  x = jnp.ones((4, 2))
  assert sharding.constrain(x, sharding.TOKENS) is x
  assert sharding.size(None) == sharding.size(None, sharding.EXPERT) == 1
  assert not sharding.is_explicit(None)
  batch = {"inputs": np.ones((2, 3))}
  assert sharding.place_batch(batch, None) is batch
  assert sharding.state_shardings(None, None) is None


@pytest.mark.parametrize(
  ("rows", "devices", "padded"), [(8, 8, 8), (9, 8, 16), (1, 8, 8), (7, 1, 7)]
)
def test_padded_rows(rows, devices, padded):
  assert sharding.padded_rows(rows, devices) == padded


def experiment(**moe) -> ExperimentConfig:
  return ExperimentConfig(
    model=ModelConfig(
      vocab_size=300,
      hidden_size=16,
      num_layers=2,
      attention=AttentionConfig(
        num_heads=2, nope_dim=8, rope_dim=4, value_dim=8, kv_rank=8
      ),
      dense_size=32,
      moe=MoEConfig(**{"num_experts": 8, "top_k": 2, "expert_size": 8} | moe),
    ),
    data=DataConfig(vocab_size=300),
    train=TrainConfig(steps=10, batch_size=8, seq_len=16),
  )


def abstract_mesh(*shape: int):
  """Of data, expert and tensor."""
  return jax.sharding.AbstractMesh((1, *shape), sharding.AXES)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (1, 2, 4), (4, 2, 1)])
def test_a_run_that_fits(shape):
  sharding.require_fit(experiment(), abstract_mesh(*shape))
  sharding.require_fit(experiment(), None)


@pytest.mark.parametrize(
  ("shape", "moe", "message"),
  [
    (
      (8, 2, 1),
      {},
      r"^train.batch_size / train.accumulation: 8; valid: a multiple of "
      r"mesh.replica \* mesh.data \* mesh.expert = 16$",
    ),
    (
      (1, 8, 1),
      {"num_experts": 12},
      r"^model.moe.num_experts: 12; valid: a multiple of mesh.expert = 8$",
    ),
    ((1, 1, 3), {}, r"^train.seq_len: 16; valid: .* mesh.tensor = 3$"),
    (
      (1, 1, 16),
      {},
      r"^model.moe.expert_size: 8; valid: a multiple of mesh.tensor = 16$",
    ),
    (
      (4, 2, 1),
      {"dispatch": "dropless"},
      r"^model.moe.dispatch: dropless; valid: bucketed or dense with",
    ),
  ],
)
def test_a_run_that_does_not_fit(shape, moe, message):
  with pytest.raises(InputError, match=message):
    sharding.require_fit(experiment(**moe), abstract_mesh(*shape))


def test_experts_without_experts():
  whole = experiment()
  dense = dataclasses.replace(whole.model, moe=None)
  with pytest.raises(InputError, match=r"^mesh.expert: 2; valid: 1 for a mod"):
    sharding.require_fit(
      dataclasses.replace(whole, model=dense), abstract_mesh(4, 2, 1)
    )


def test_parameters_by_the_names_of_their_axes():
  def spec(axes: str, *shape: int):
    mesh = abstract_mesh(4, 2, 2)
    return sharding.parameter_spec(axes.split(), shape, mesh)

  data, expert, tensor = sharding.AXES[1:]
  P = sharding.P
  gate, down = "expert embed mlp", "expert mlp embed"
  expected = P(None, expert, data, tensor)
  assert spec(gate, 3, 6, 8, 4) == expected
  assert spec(gate, 6, 8, 4) == P(*expected[1:])  # one block of the stack
  assert spec(down, 3, 6, 8, 8) == P(None, expert, (tensor, data))
  assert spec("embed mlp", 1, 16, 4) == P(None, data, tensor)
  assert spec("mlp embed", 3, 8, 16) == P(None, (tensor, data))
  # An axis of the mesh splits the first that asks for it, and no other.
  assert spec("embed heads head_dim", 3, 16, 4, 6) == P(None, data)
  assert spec("heads head_dim embed", 3, 4, 6, 16) == P(None, data)
  assert spec("stream_inputs mixing", 3, 64, 24) == P(None, data)
  assert spec("memory outputs embed", 8, 5, 16) == P(data)
  assert spec("vocab embed", 60, 16) == P(data)
  assert spec("width router_scores", 3, 16, 8) == spec("width", 3, 16) == P()
  # An axis that a size does not divide by is left out, the others stay.
  assert spec(gate, 3, 5, 8, 4) == P(None, None, data, tensor)
  assert spec(down, 3, 6, 6, 8) == P(None, expert, tensor)
  assert spec("vocab embed", 61, 16) == P(None)
  # What an optimizer keeps of an array as a whole.
  assert spec("vocab embed") == P()


def test_a_state_is_placed_by_what_its_parameters_say():
  mesh = sharding.make_mesh(MeshConfig(), devices=EIGHT)
  params = nnx.State({"head": param(jnp.zeros((16, 4)), axes=VOCABULARY)})
  state = TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    balance=nnx.State({}),
    opt_state=optax.adamw(1.0).init(params),
    tables={},
    table_states={},
  )
  found = flatten(sharding.state_shardings(state, mesh))
  split, whole = sharding.P(sharding.DATA), sharding.P()
  assert {name: leaf.spec for name, leaf in found.items()} == {
    "step": whole,
    "params/head": split,
    "opt_state/0/count": whole,
    "opt_state/0/mu/head": split,
    "opt_state/0/nu/head": split,
  }
  # A user's own parameter, among ours or in the optimizer's state alone.
  own = nnx.State({"adapter": nnx.Param(jnp.zeros((16, 4)))})
  bare = nnx.State({"adapter": jnp.zeros((16, 4))})
  for changes in (
    dict(params=own),
    dict(params=bare),
    dict(balance=own),
    dict(opt_state=optax.adamw(1.0).init(own)),
  ):
    changed = dataclasses.replace(state, **changes)
    message = r"^parameter (0/mu/)?adapter: .* without axes.*; valid: a Vari"
    with pytest.raises(InputError, match=message):
      sharding.state_shardings(changed, mesh)
