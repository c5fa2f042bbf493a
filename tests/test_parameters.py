"""What parameters say of themselves, and that it stays with them."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from engram_jax import sharding
from engram_jax.errors import InputError
from engram_jax.parameters import Metadata, map_parameters, metadata_of, param
from engram_jax.presets import PRESETS, preset
from engram_jax.run_config import MeshConfig, TrainConfig
from engram_jax.training.muon import matrix_axes
from engram_jax.training.optimizers import backbone_optimizer, decay_mask
from engram_jax.training.state import abstract_model, flatten

#: Made once from the patterns over names that the metadata took the place of.
#: Each kind: how it is split on each of the meshes, the axes of its matrices'
#: rows and columns, whether it decays, and whether it stays in float32.
GOLDEN = pathlib.Path(__file__).parent / "golden" / "parameters.json"
AXES = ("embed", "heads", "head_dim")


def make(**changes):
  options = dict(axes=AXES, matrix=("embed", ("heads", "head_dim")))
  return param(jnp.zeros((4, 2, 3)), **options | changes)


@functools.cache
def golden():
  return json.loads(GOLDEN.read_text())


def described(name, metadata, leaf, meshes):
  """What `golden` has of a parameter."""
  specs = []
  for mesh in meshes:
    spec = sharding.parameter_spec(metadata.axes, leaf.shape, mesh)
    entries = [list(e) if isinstance(e, tuple) else e for e in spec]
    while entries and entries[-1] is None:
      entries.pop()
    specs.append(entries)
  matrix = matrix_axes(name, metadata, leaf)
  matrix = matrix and [list(side) for side in matrix]
  return [specs, matrix, metadata.decay, metadata.float32]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_as_their_names_had_it(name):
  meshes = [
    jax.sharding.AbstractMesh(tuple(shape), sharding.AXES)
    for shape in golden()["meshes"]
  ]
  found = {}

  def describe(path, metadata, leaf):
    found[path] = described(path, metadata, leaf, meshes)

  _, params, balance = abstract_model(preset(name).model)
  map_parameters(describe, params)
  map_parameters(describe, balance)
  kinds = golden()["kinds"]
  expected = {k: kinds[at] for k, at in golden()["presets"][name].items()}
  assert found == expected
  decays = {k: kind[2] for k, kind in expected.items()}
  assert flatten(decay_mask(params)).items() <= decays.items()


# --- it stays with the Variable ---


class Block(nnx.Module):
  """One matrix."""

  def __init__(self, key):
    draw = jax.random.normal(key, (4, 2, 3))
    self.query = param(draw, axes=AXES, matrix=("embed", AXES[1:]))

  def __call__(self):
    return jnp.sum(self.query[...] ** 2)


def stacked():
  return nnx.vmap(Block)(jax.random.split(jax.random.key(0), 5))


def test_it_stays_with_the_variable():
  expected = make().get_metadata()
  graph, state = nnx.split(stacked())
  again, _ = nnx.split(stacked())
  assert graph == again and hash(graph) == hash(again)

  def check(tree, shape):
    for node in jax.tree.leaves(
      tree, is_leaf=lambda x: isinstance(x, nnx.Variable)
    ):
      assert node.get_metadata() == expected
      assert node.shape == shape

  check(state, (5, 4, 2, 3))
  check(jax.eval_shape(lambda: state), (5, 4, 2, 3))
  check(jax.jit(lambda x: jax.tree.map(jnp.sin, x))(state), (5, 4, 2, 3))
  check(jax.tree.map(lambda x: x[0], state), (4, 2, 3))
  check(nnx.state(nnx.merge(graph, state)), (5, 4, 2, 3))
  moments = optax.adam(1.0).init(state)[0]
  check((moments.mu, moments.nu), (5, 4, 2, 3))
  one = jax.tree.map(lambda x: x[0], state)
  check(jax.grad(lambda x: nnx.merge(graph, x)())(one), (4, 2, 3))
  # A stack and a slice of it are the same matrices.
  metadata = metadata_of("query", state["query"])
  for leaf, axes in (
    (state["query"], (1, (2, 3))),
    (one["query"], (0, (1, 2))),
  ):
    rows, columns = matrix_axes("query", metadata, leaf[...])
    assert (rows, columns) == ((axes[0],), axes[1])


def test_flax_s_own_optimizer_with_a_mask_made_beforehand():
  model = Block(jax.random.key(0))
  mask = nnx.as_pure(decay_mask(nnx.state(model, nnx.Param)))
  tx = optax.adamw(0.1, weight_decay=0.5, mask=mask)
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  before = model.query[...]
  zeros = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
  optimizer.update(model, zeros)
  np.testing.assert_allclose(model.query[...], 0.95 * before, rtol=1e-6)


def test_a_model_on_a_mesh_in_force_places_nothing_by_itself():
  # Names that Flax read would be mesh axes that no mesh has.
  mesh = sharding.make_mesh(MeshConfig(2, 2, 2), devices=[jax.devices()[0]] * 8)
  with jax.set_mesh(mesh):
    shapes = jax.eval_shape(lambda: nnx.split(stacked())[1])
  assert shapes["query"].shape == (5, 4, 2, 3)


# --- what is refused ---


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(axes=AXES[:2]), r"^axes: \('embed', 'heads'\); valid: 3 different"),
    (dict(axes=("embed", "embed", "heads")), r"^axes: .*; valid: 3 different"),
    (dict(matrix=("embed", "mlp")), r"^matrix: .*; valid: rows and columns, "),
    (dict(matrix=("embed", AXES)), r"^matrix: .*; valid: rows and columns, "),
    (dict(matrix=("embed", ())), r"^matrix: .*; valid: rows and columns, "),
  ],
)
def test_metadata_that_does_not_fit_the_array(changes, message):
  with pytest.raises(InputError, match=message):
    make(**changes)


def test_an_axis_that_no_table_has():
  mesh = jax.sharding.AbstractMesh((1, 2, 2, 2), sharding.AXES)
  with pytest.raises(InputError, match=r"^axes: embde; valid: names of vocab"):
    sharding.parameter_spec(("embde", "heads"), (4, 4), mesh)


BARE = {
  "made by Flax alone": lambda x: nnx.Param(x),
  "with some of it": lambda x: nnx.Param(x, axes=("vocab", "embed")),
}


@pytest.mark.parametrize("bare", BARE.values(), ids=BARE)
def test_a_parameter_that_says_nothing_is_refused_by_name(bare):
  _, params, _ = abstract_model(preset("tiny").model)
  params["embedding"]["table"] = bare(params["embedding"]["table"].get_value())
  config = TrainConfig(steps=10, batch_size=4, seq_len=8)
  message = (
    r"^parameter embedding/table: Param without .*; valid: a Variable made by "
    r"engram_jax.parameters.param(\n|$)"
  )

  def update(tx):
    return tx.update(params, tx.init(params), params)

  for optimizer in ("muon", "adamw"):
    tx = backbone_optimizer(dataclasses.replace(config, optimizer=optimizer))
    with pytest.raises(InputError, match=message):
      jax.eval_shape(functools.partial(update, tx))
  mesh = jax.sharding.AbstractMesh((1, 2, 2, 2), sharding.AXES)
  with pytest.raises(InputError, match=message), sharding.use(mesh):
    jax.eval_shape(
      functools.partial(sharding.for_compute, dtype="float32"), params
    )


def test_bare_arrays_are_refused_by_name():
  arrays = nnx.State({"query": jnp.zeros((4, 2, 3))})
  message = r"^parameter query: .* without axes, matrix, decay, float32; valid"
  with pytest.raises(InputError, match=message):
    decay_mask(arrays)


def test_defaults():
  assert metadata_of("x", param(jnp.zeros(3), axes=("width",))) == Metadata(
    ("width",), None, decay=True, float32=False
  )
