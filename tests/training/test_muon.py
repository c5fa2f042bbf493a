"""Tests of Muon: against NumPy, matrix by matrix, and who is moved by it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from engram_jax.config import (
  AttentionConfig,
  EngramConfig,
  ModelConfig,
  MoEConfig,
)
from engram_jax.errors import InputError
from engram_jax.parameters import param
from engram_jax.run_config import TrainConfig
from engram_jax.training import muon
from engram_jax.training.muon import orthogonalized
from engram_jax.training.optimizers import (
  backbone_optimizer,
  decay_mask,
  optimizer_names,
)
from engram_jax.training.state import abstract_model, flatten

STEPS, MOMENTUM, DECAY = 3, 0.9, 0.1
MODEL = ModelConfig(
  vocab_size=64,
  hidden_size=16,
  num_layers=3,
  attention=AttentionConfig(
    num_heads=2, nope_dim=8, rope_dim=4, value_dim=12, kv_rank=6
  ),
  dense_size=24,
  moe=MoEConfig(num_experts=4, top_k=2, expert_size=8, num_shared=1),
  engram=EngramConfig(
    hidden_size=16,
    layers=(0, 2),
    rows_per_head=(50, 50),
    heads=2,
    head_dim=4,
    streams=2,
    projection_bias=True,
  ),
  streams=2,
  tie_embeddings=False,
)
#: Shapes and axes of parameters by name, and their matrices as slices of one:
#: the axes to move to the front, and the rows of what is left.
STACKS = {
  "moe_blocks/attention/query": (
    dict(layers=2, embed=6, heads=2, head_dim=5),
    ("embed", ("heads", "head_dim")),
    (0,),
    6,
  ),
  "moe_blocks/attention/out": (
    dict(layers=2, heads=2, head_dim=3, embed=8),
    (("heads", "head_dim"), "embed"),
    (0,),
    6,
  ),
  "moe_blocks/attention/kv_down": (
    dict(layers=2, embed=7, latent=4),
    ("embed", "latent"),
    (0,),
    7,
  ),
  "moe_blocks/ffn/gate": (
    dict(layers=2, expert=3, embed=5, mlp=4),
    ("embed", "mlp"),
    (0, 1),
    5,
  ),
  "dense_blocks/ffn/down": (
    dict(layers=1, mlp=4, embed=9),
    ("mlp", "embed"),
    (0,),
    4,
  ),
  "engrams/0/projection": (
    dict(memory=8, outputs=3, embed=5),
    ("memory", "embed"),
    (1,),
    8,
  ),
}
SHAPES = {name: tuple(sizes.values()) for name, (sizes, *_) in STACKS.items()}
#: What else the parameters of these tests are.
VECTORS = {
  "embedding/table": dict(axes=("vocab", "embed")),
  "engrams/0/conv_kernel": dict(axes=("taps", "streams", "width")),
  "engrams/0/key_scale": dict(axes=("streams", "width"), decay=False),
  "engrams/0/projection_bias": dict(axes=("outputs", "width"), decay=False),
  "head": dict(axes=("vocab", "embed")),
  "moe_blocks/attention_norm/scale": dict(
    axes=("layers", "width"), decay=False
  ),
}
METADATA = VECTORS | {
  name: dict(axes=tuple(sizes), matrix=matrix)
  for name, (sizes, matrix, *_) in STACKS.items()
}


def config(**changes) -> TrainConfig:
  options = dict(muon_momentum=MOMENTUM, weight_decay=DECAY, optimizer="muon")
  return TrainConfig(steps=10, batch_size=4, seq_len=8, **options | changes)


def state_of(arrays) -> nnx.State:
  """The tree in which a model has the parameters of these names."""
  tree: dict = {}
  for name, value in arrays.items():
    *folders, last = name.split("/")
    at = tree
    for folder in folders:
      at = at.setdefault(int(folder) if folder.isdigit() else folder, {})
    at[last] = param(jnp.asarray(value, jnp.float32), **METADATA[name])
  return nnx.State(tree)


def draw(shapes, seed: int):
  rng = np.random.default_rng(seed)
  return {name: rng.normal(size=shape) for name, shape in shapes.items()}


@functools.cache
def jitted(config):
  optimizer = backbone_optimizer(config)
  return jax.jit(optimizer.init), jax.jit(optimizer.update)


def run(config, params, gradients):
  """Updates by name for each of `gradients`; the parameters move by them."""
  init, update = jitted(config)
  params = state_of(params)
  state, found = init(params), []
  for gradient in gradients:
    updates, state = update(state_of(gradient), state, params)
    params = optax.apply_updates(params, updates)
    found.append({k: np.asarray(v) for k, v in flatten(updates).items()})
  return found


def matrices_of(name, stack):
  """[count, rows, columns] of a stack of STACKS."""
  _, _, front, rows = STACKS[name]
  stack = np.moveaxis(stack, front, range(len(front)))
  return stack.reshape(-1, rows, math.prod(stack.shape[len(front) :]) // rows)


def newton_schulz(x):
  x = x / np.sqrt(np.sum(x**2))
  for _ in range(5):
    square = x @ x.T
    x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
  return x


@pytest.fixture(scope="module")
def stacks():
  """Parameters, gradients of each step, and the updates that Muon made."""
  params = draw(SHAPES, 0)
  gradients = [draw(SHAPES, seed) for seed in range(1, STEPS + 1)]
  return params, gradients, run(config(), params, gradients)


@pytest.mark.parametrize("name", STACKS)
def test_each_matrix_as_numpy_moves_it(name, stacks):
  params, gradients, found = stacks
  weights = matrices_of(name, params[name])
  momentum = np.zeros_like(weights)
  scale = 0.2 * math.sqrt(max(weights.shape[1:]))
  for gradient, updates in zip(gradients, found, strict=True):
    g = matrices_of(name, gradient[name])
    momentum = MOMENTUM * momentum + g
    nesterov = g + MOMENTUM * momentum
    moved = np.stack([newton_schulz(x) for x in nesterov])
    update = -scale * moved - DECAY * weights
    weights = weights + update
    np.testing.assert_allclose(
      matrices_of(name, updates[name]), update, rtol=1e-4, atol=2e-5
    )


@pytest.mark.parametrize("name", STACKS)
def test_updates_are_nearly_orthogonal(name, stacks):
  params, _, (found, *_) = stacks
  matrices = matrices_of(name, found[name] + DECAY * params[name])
  longest = max(matrices.shape[1:])
  values = np.linalg.svd(matrices / (0.2 * math.sqrt(longest)))[1]
  assert 0.6 < values.min() and values.max() < 1.25
  # RMS of an update, whatever the shape: that of AdamW.
  rms = np.sqrt(np.mean(matrices**2, axis=(1, 2)))
  assert (0.12 < rms).all() and (rms < 0.25).all()


def test_one_expert_s_gradient_moves_no_other():
  name = "moe_blocks/ffn/gate"
  zeros = {name: np.zeros(SHAPES[name])}
  gradient = draw({name: SHAPES[name]}, 1)
  larger = {name: gradient[name].copy()}
  larger[name][1, 2] *= 1000
  larger[name][0, 0] = 0  # an expert that no token went to
  (plain,) = run(config(), zeros, [gradient])
  (found,) = run(config(), zeros, [larger])
  assert not found[name][0, 0].any()
  np.testing.assert_allclose(found[name][1, 2], plain[name][1, 2], rtol=1e-4)
  np.testing.assert_array_equal(found[name][0, 1:], plain[name][0, 1:])
  np.testing.assert_array_equal(found[name][1, :2], plain[name][1, :2])


def test_the_rest_gets_adamw_exactly():
  shapes = {
    "embedding/table": (10, 4),
    "engrams/0/conv_kernel": (4, 2, 4),
    "engrams/0/key_scale": (2, 4),
    "engrams/0/projection_bias": (3, 4),
    "head": (10, 4),
    "moe_blocks/attention_norm/scale": (2, 4),
  }
  matrix = {"moe_blocks/ffn/gate": SHAPES["moe_blocks/ffn/gate"]}
  params = draw(shapes | matrix, 0)
  gradients = [draw(shapes | matrix, seed) for seed in (1, 2)]
  constants = dict(adam_b1=0.8, adam_b2=0.9, adam_eps=1e-3)
  found = run(config(**constants), params, gradients)
  wanted = run(config(optimizer="adamw", **constants), params, gradients)
  for ours, theirs in zip(found, wanted, strict=True):
    for name in shapes:
      np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert not np.allclose(ours[next(iter(matrix))], theirs[next(iter(matrix))])


# --- which parameter is moved by what ---


@pytest.fixture(scope="module")
def params():
  """A model's, as shapes, with everything that a model can have."""
  return abstract_model(MODEL)[1]


BLOCK = (
  "attention/key_rope",
  "attention/key_up",
  "attention/kv_down",
  "attention/out",
  "attention/query",
  "attention/value_up",
  "attention_streams/kernel",
  "ffn_streams/kernel",
  "ffn/down",
  "ffn/gate",
  "ffn/up",
)
EXPERTS = ("ffn/router", "ffn/shared/down", "ffn/shared/gate", "ffn/shared/up")


def test_every_parameter_of_a_model(params):
  names = flatten(optimizer_names(params))
  assert names.keys() == flatten(params).keys()
  matrices = {
    *(f"dense_blocks/{name}" for name in BLOCK),
    *(f"moe_blocks/{name}" for name in BLOCK + EXPERTS),
    "engrams/0/projection",
    "engrams/1/projection",
  }
  assert {k for k, name in names.items() if name == "muon"} == matrices
  assert {k for k, name in names.items() if name == "adamw"} >= {
    "embedding/table",
    "engrams/0/conv_kernel",
    "engrams/0/projection_bias",
    "head",
    "moe_blocks/attention/kv_norm/scale",
    "moe_blocks/attention_streams/bias",
    "norm/scale",
  }
  # All of Muon's decay, and what AdamW has of arrays that are no vectors.
  decays = {k for k, decays in flatten(decay_mask(params)).items() if decays}
  taps = {f"engrams/{i}/conv_kernel" for i in (0, 1)}
  assert decays == matrices | taps | {"embedding/table", "head"}


def test_the_state_is_arrays_of_unique_names(params):
  state = jax.eval_shape(backbone_optimizer(config()).init, params)
  leaves = flatten(state)
  assert all(isinstance(x, jax.ShapeDtypeStruct) for x in leaves.values())
  shapes = {k: v.shape for k, v in flatten(params).items()}
  momentum, moments = set(), set()
  for name, leaf in leaves.items():
    for kind, found in (("trace", momentum), ("mu", moments), ("nu", moments)):
      parameter = name.partition(f"/{kind}/")[2]
      if parameter:
        assert leaf.shape == shapes[parameter] and leaf.dtype == jnp.float32
        found.add(parameter)
  assert momentum | moments == shapes.keys() and not momentum & moments
  # Half of Adam's, and nothing besides but Adam's count.
  assert len(leaves) == len(momentum) + 2 * len(moments) + 1


def test_muon_of_what_is_no_matrix():
  params = state_of({"head": np.zeros((10, 4))})
  optimizer = muon.muon(momentum=MOMENTUM, weight_decay=DECAY)
  message = r"^parameter head: no matrix; valid: one that says "
  with pytest.raises(InputError, match=message):
    optimizer.update(params, optimizer.init(params), params)


def test_an_array_of_fewer_axes_than_it_says():
  params = jax.tree.map(lambda x: x[0], state_of({"head": np.zeros((10, 4))}))
  message = r"^parameter head: 1 axes; valid: at least the axes vocab, embed$"
  with pytest.raises(InputError, match=message):
    optimizer_names(params)


def test_rows_of_several_axes_are_one_side():
  x = jax.random.normal(jax.random.key(0), (4, 3, 5))
  whole = jax.jit(orthogonalized, static_argnums=1)
  found = whole(x, MuonDimensionNumbers((0, 1), -1))
  flat = whole(x.reshape(12, 5), MuonDimensionNumbers())
  np.testing.assert_allclose(found, flat.reshape(x.shape), rtol=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e16, 1e25, 1e37])
def test_newton_schulz_of_a_matrix_of_any_size(size):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 6)), jnp.float32)
  # One huge matrix in a stack leaves the other alone.
  found = muon.newton_schulz(x * jnp.array([size, 1.0])[:, None, None])
  expected = muon.newton_schulz(x)
  if not size:
    expected = expected.at[0].set(0)
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
