"""Experts over meshes of eight devices against the same layer on one.

The tests that need devices run in a process of their own that simulates them:
`test_on_eight_simulated_devices` starts it on this file, once for all meshes.
"""

import math
import os
import re
import subprocess
import sys
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from engram_jax import sharding
from engram_jax.backbone import expert_parallel, routing
from engram_jax.backbone.moe import MoE
from engram_jax.config import MoEConfig
from engram_jax.errors import InputError
from engram_jax.parameters import map_parameters
from engram_jax.run_config import MeshConfig

FLAG = "--xla_force_host_platform_device_count=8"
SIMULATED = FLAG in os.environ.get("XLA_FLAGS", "")
MESHES = [(8, 1, 1), (4, 2, 1), (2, 4, 1), (2, 2, 2), (1, 8, 1)]
WIDTH, EXPERTS, TOP_K, FFN = 12, 8, 2, 10
BATCH, LENGTH = 16, 5
# Nothing is dropped; about a third is.
ROOM, TIGHT = float(EXPERTS), 0.7


@cache
def make(*, dtype="float32", factor=ROOM, **fields):
  config = {
    "num_experts": EXPERTS,
    "top_k": TOP_K,
    "expert_size": FFN,
    "num_shared": 1,
    "capacity_factor": factor,
    "balance_loss": 0.1,
  }
  config = MoEConfig(**(config | fields))
  layer = MoE(WIDTH, config, init_std=0.3, dtype=dtype, rngs=nnx.Rngs(0))
  # Loads that differ, so that experts and devices fill unevenly.
  layer.bias[...] = jnp.linspace(-0.1, 0.1, EXPERTS)
  return layer


def tokens(batch=BATCH):
  values = np.random.default_rng(1).normal(size=(batch, LENGTH, WIDTH))
  return jnp.asarray(values, jnp.float32)


def loss_of(form, balance=True):
  """value_and_grad of a scalar: ((loss, (y, metrics)), (by layer, by x))."""

  @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
  def loss(layer, x):
    y, metrics = layer(x, dispatch=form)
    total = jnp.sum(jnp.sin(y.astype(jnp.float32)))
    return total + balance * metrics.balance_loss, (y, metrics)

  return loss


def mesh_of(shape):
  return sharding.make_mesh(MeshConfig(*shape))


def placed(layer, x, mesh):
  """As the training state and its batches are placed."""

  def of_parameter(_, metadata, leaf):
    spec = sharding.parameter_spec(metadata.axes, leaf.shape, mesh)
    return NamedSharding(mesh, spec)

  layer = jax.device_put(layer, map_parameters(of_parameter, layer))
  return layer, jax.device_put(x, sharding.batch_sharding(mesh))


def on_mesh(function, mesh):
  """The jitted function, traced for the mesh; no mesh is set around it."""

  def traced(*arguments):
    with sharding.use(mesh):
      return function(*arguments)

  return jax.jit(traced)


#: Dropless: with room enough the other forms give the same.
alone = jax.jit(loss_of("dense"))
#: Of one device's part of the batch.
tight_alone = jax.jit(loss_of("bucketed", balance=False))


@cache
def compiled_for(shape, form):
  mesh = mesh_of(shape)
  run = on_mesh(loss_of(form), mesh)
  return run.lower(*placed(make(), tokens(), mesh)).compile()


def assert_trees_close(found, expected, tolerance=5e-6):
  """Each leaf within `tolerance` of its largest value: sums are reordered."""
  found, expected = map(jax.tree_util.tree_leaves_with_path, (found, expected))
  for (path, a), (_, b) in zip(found, expected, strict=True):
    error = np.abs(np.asarray(a, np.float32) - b).max()
    name = jax.tree_util.keystr(path)
    assert error <= tolerance * np.abs(b).max(), (name, error)


def collectives(compiled, kind):
  """Dtype and dimensions of what each such operation of a program returns."""
  result = rf"= (.*?) {kind}(?:-start)?\("
  return [
    (dtype, tuple(map(int, filter(None, dims.split(",")))))
    for line in re.findall(result, compiled.as_text())
    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", line)
  ]


def test_on_eight_simulated_devices():
  command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
  done = subprocess.run(
    [*command, f"{__file__}::TestOnEightDevices"],
    # Most of the time is the compiler's.
    env=os.environ
    | {
      "XLA_FLAGS": f"{FLAG} --xla_backend_optimization_level=0",
      "JAX_PLATFORMS": "cpu",
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  assert done.returncode == 0, done.stdout


class TestOnEightDevices:
  # Elsewhere they are not there at all: a skipped test reads as a missing one.
  __test__ = SIMULATED

  @pytest.mark.parametrize("form", ["dense", "bucketed"])
  @pytest.mark.parametrize("shape", MESHES)
  def test_values_and_gradients_are_those_of_one_device(self, shape, form):
    mesh = mesh_of(shape)
    found = compiled_for(shape, form)(*placed(make(), tokens(), mesh))
    expected = alone(make(), tokens())
    assert_trees_close(found, expected)
    metrics = found[0][1][1]
    assert metrics.dropped == 0
    np.testing.assert_array_equal(metrics.load, expected[0][1][1].load)
    # The test would be weak if an expert had no gradient to get wrong.
    assert (metrics.load > 0).all()
    assert found[0][1][0].sharding.is_equivalent_to(
      sharding.batch_sharding(mesh), 3
    )

  @pytest.mark.parametrize("shape", MESHES)
  def test_capacity_and_drops_are_those_of_each_device(self, shape):
    mesh = mesh_of(shape)
    layer, x = make(factor=TIGHT), tokens()
    (_, (y, metrics)), (by_layer, by_x) = on_mesh(
      loss_of("bucketed", balance=False), mesh
    )(*placed(layer, x, mesh))

    ids, _, _ = routing.route(
      x.reshape(-1, WIDTH), layer.router[...], layer.bias[...], top_k=TOP_K
    )
    parts = sharding.size(mesh, *sharding.BATCH)
    ids = np.asarray(ids).reshape(parts, -1)
    capacity = int(np.ceil(ids.shape[1] * TIGHT / EXPERTS))
    dropped = sum(
      np.maximum(np.bincount(part, minlength=EXPERTS) - capacity, 0).sum()
      for part in ids
    )
    assert metrics.dropped == dropped > 0
    counts = np.bincount(ids.ravel(), minlength=EXPERTS)
    np.testing.assert_array_equal(metrics.load, counts)

    results = [tight_alone(layer, part) for part in jnp.split(x, parts)]
    ys = [aux[0] for (_, aux), _ in results]
    by_layers = [grads[0] for _, grads in results]
    by_xs = [grads[1] for _, grads in results]
    total = jax.tree.map(lambda *leaves: sum(leaves), *by_layers)
    assert_trees_close(
      (y, by_layer, by_x), (jnp.concat(ys), total, jnp.concat(by_xs))
    )

  @pytest.mark.parametrize("shape", [(8, 1, 1), (4, 1, 2)])
  def test_dropless_without_an_expert_axis(self, shape):
    found = compiled_for(shape, "dropless")(
      *placed(make(), tokens(), mesh_of(shape))
    )
    assert_trees_close(found, alone(make(), tokens()))

  @pytest.mark.parametrize("shape", MESHES)
  def test_no_token_is_gathered_to_be_bucketed(self, shape):
    compiled = compiled_for(shape, "bucketed")
    _, experts, tensor = shape
    # The experts' matrices, whole and in equal parts, and nothing else.
    whole = EXPERTS // experts * WIDTH * FFN // tensor
    gathered = collectives(compiled, "all-gather")
    sizes = {math.prod(dimensions) for _, dimensions in gathered}
    assert all(whole % size == 0 for size in sizes), sizes
    assert bool(collectives(compiled, "all-to-all")) == (shape[1] > 1)

  def test_the_search_finds_what_dense_gathers(self):
    gathered = collectives(compiled_for((2, 4, 1), "dense"), "all-gather")
    assert ("f32", (BATCH * LENGTH // 2, WIDTH)) in gathered

  def test_bfloat16(self):
    mesh = mesh_of((2, 2, 2))
    layer, x = make(dtype="bfloat16"), tokens().astype(jnp.bfloat16)
    (_, (y, _)), grads = on_mesh(loss_of("bucketed"), mesh)(
      *placed(layer, x, mesh)
    )
    assert y.dtype == jnp.bfloat16
    assert {g.dtype for g in jax.tree.leaves(grads[0])} == {jnp.dtype("f4")}
    # The same rounded tokens, or some would choose other experts.
    (_, (exact, _)), exact_grads = alone(make(), x.astype(jnp.float32))
    assert_trees_close((y, grads), (exact, exact_grads), tolerance=0.05)

  def test_under_set_mesh(self):
    mesh = mesh_of((2, 2, 2))
    layer, x = placed(make(), tokens(), mesh)
    with jax.set_mesh(mesh):
      found = jax.jit(loss_of("bucketed"))(layer, x)
    assert_trees_close(found, alone(make(), tokens()))


# --- what a trace tells, without devices ---


def for_mesh(trace, shape):
  """The tracing function `trace`, for a mesh of this shape."""

  def traced(*arguments):
    types = (AxisType.Auto,) * len(sharding.AXES)
    mesh = AbstractMesh((1, *shape), sharding.AXES, axis_types=types)
    with sharding.use(mesh):
      return trace(*arguments)

  return traced


def test_gradients_of_weights_are_summed_in_float32():
  trace = for_mesh(jax.make_jaxpr(loss_of("bucketed")), (2, 2, 1))
  jaxpr = trace(make(dtype="bfloat16"), tokens())
  found = r":(\w+)\[([\d,]*)\]\S* = reduce_scatter\["
  sums = re.findall(found, str(jaxpr))
  # Each device keeps its part along `data`.
  for shape in (EXPERTS // 2, WIDTH // 2, FFN), (EXPERTS // 2, FFN // 2, WIDTH):
    kinds = {kind for kind, dims in sums if dims == ",".join(map(str, shape))}
    assert kinds == {"f32"}


def test_no_mesh_no_parallel_experts():
  with pytest.raises(InputError, match="mesh: None; valid: one of the axes"):
    layer = make()
    weights = (layer.router, layer.bias, layer.gate, layer.up, layer.down)
    expert_parallel.apply_routed(
      "dense",
      tokens(),
      *(w[...] for w in weights),
      top_k=TOP_K,
      capacity_factor=1.0,
      dtype="float32",
    )


@pytest.mark.parametrize(
  ("shape", "form", "batch", "message"),
  [
    (
      (4, 2, 1),
      "dropless",
      BATCH,
      "dispatch: dropless; valid: bucketed or dense with mesh.expert = 2",
    ),
    (
      (2, 4, 1),
      "bucketed",
      12,
      r"x.shape\[0\]: 12; valid: a multiple of .*data \* mesh.expert = 8",
    ),
    (
      (1, 16, 1),
      "bucketed",
      BATCH,
      "num_experts: 8; valid: a multiple of mesh.expert = 16",
    ),
    (
      (1, 1, 4),
      "dense",
      BATCH,
      "expert_size: 10; valid: a multiple of mesh.tensor = 4",
    ),
    ((8, 1, 1), "sparse", BATCH, "dispatch: sparse; valid: one of dense"),
  ],
)
def test_what_a_mesh_does_not_divide_is_refused(shape, form, batch, message):
  run = lambda layer, x: layer(x, dispatch=form)
  trace = for_mesh(partial(jax.eval_shape, run), shape)
  layer, x = make(), tokens(batch)
  with pytest.raises(InputError, match=message):
    trace(layer, x)
