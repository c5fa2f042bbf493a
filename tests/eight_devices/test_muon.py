"""Muon where every device has a piece of each matrix, against one device."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from engram_jax import sharding
from engram_jax.analysis.compiled import (
  collective_counts,
  collectives,
  memory_report,
)
from engram_jax.parameters import param
from engram_jax.training.muon import muon

BATCH = sharding.BATCH
#: Axes, matrix and layout by name: counts that eight devices do not divide,
#: fewer than there are, sides of several axes, and what every device has whole.
STACKS = {
  "expert_gate": (
    dict(layers=5, expert=4, embed=16, mlp=8),
    ("embed", "mlp"),
    P(None, "expert", "data", "tensor"),
  ),
  "expert_down": (
    dict(layers=5, expert=4, mlp=8, embed=16),
    ("mlp", "embed"),
    P(None, "expert", "tensor", "data"),
  ),
  "query": (
    dict(layers=5, embed=16, heads=2, head_dim=6),
    ("embed", ("heads", "head_dim")),
    P(None, BATCH),
  ),
  "out": (
    dict(layers=9, heads=2, head_dim=6, embed=16),
    (("heads", "head_dim"), "embed"),
    P(None, None, None, BATCH),
  ),
  "gate": (
    dict(layers=1, embed=16, mlp=8),
    ("embed", "mlp"),
    P(None, BATCH, "tensor"),
  ),
  "projection": (
    dict(memory=12, outputs=3, embed=16),
    ("memory", "embed"),
    P(None, None, BATCH),
  ),
  "router": (dict(layers=9, embed=16, scores=4), ("embed", "scores"), P()),
  "streams": (dict(layers=5, embed=16, mixing=4), ("embed", "mixing"), P()),
}
EXPERTS = {
  "expert_gate": (
    dict(layers=30, expert=9, embed=64, mlp=32),
    ("embed", "mlp"),
    P(None, None, "data", ("expert", "tensor")),
  )
}
STEPS = 3


def parameters(stacks, make):
  """A parameter for each of `stacks`, of `make(shape, layout)`."""
  return {
    name: param(
      make(tuple(sizes.values()), layout), axes=tuple(sizes), matrix=matrix
    )
    for name, (sizes, matrix, layout) in stacks.items()
  }


def optimizer_of(stacks):
  layouts = {
    (tuple(sizes), tuple(sizes.values())): layout
    for sizes, _, layout in stacks.values()
  }

  def spec_of(axes, shape, mesh):
    del mesh
    return layouts[axes, shape]

  return muon(momentum=0.95, weight_decay=0.1, spec_of=spec_of)


def run(mesh, params, gradients):
  """The parameters after some steps, and the optimizer's state."""
  optimizer = optimizer_of(STACKS)

  @jax.jit
  def step(params, state, gradient):
    with sharding.use(mesh):
      updates, state = optimizer.update(gradient, state, params)
    return jax.tree.map(lambda w, u: w + 0.1 * u, params, updates), state

  state = optimizer.init(params)
  for gradient in gradients:
    params, state = step(params, state, gradient)
  return params, state


@pytest.fixture(scope="module")
def whole():
  """Parameters and gradients, and what one device makes of them."""
  rng = np.random.default_rng(0)

  def draw(shape, _):
    return rng.normal(size=shape).astype(np.float32)

  drawn = [parameters(STACKS, draw) for _ in range(1 + STEPS)]
  return drawn, run(None, drawn[0], drawn[1:])


def test_as_on_one_device(auto_mesh, whole):
  drawn, (params, state) = whole
  shardings = {
    name: NamedSharding(auto_mesh, layout)
    for name, (_, _, layout) in STACKS.items()
  }
  placed = [
    {name: jax.device_put(tree[name], shardings[name]) for name in STACKS}
    for tree in drawn
  ]
  found, moments = run(auto_mesh, placed[0], placed[1:])
  for name in STACKS:
    assert found[name][...].sharding.is_equivalent_to(
      shardings[name], found[name].ndim
    ), name
    np.testing.assert_allclose(
      found[name][...], params[name][...], atol=1e-5, err_msg=name
    )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), moments, state
  )


def compiled(mesh, stacks):
  """One update of donated gradients and momentum."""
  shapes = parameters(
    stacks,
    lambda shape, layout: jax.ShapeDtypeStruct(
      shape, jnp.float32, sharding=NamedSharding(mesh, layout)
    ),
  )
  optimizer = optimizer_of(stacks)

  def update(gradients, momentum, params):
    empty = optimizer.init(params)
    state = (empty[0]._replace(trace=momentum), *empty[1:])
    with sharding.use(mesh):
      updates, state = optimizer.update(gradients, state, params)
    return updates, state[0].trace

  jitted = jax.jit(update, donate_argnums=(0, 1))
  return jitted.lower(shapes, shapes, shapes).compile()


def test_no_device_has_more_than_its_share(auto_mesh):
  """Of a stack that is split over all: it is exchanged, never gathered."""
  ((sizes, _, _),) = EXPERTS.values()
  program = compiled(auto_mesh, EXPERTS)
  share = 4 * math.prod(sizes.values()) // 8
  records = collectives(program)
  assert collective_counts(records).keys() == {"all-to-all"}
  for record in records:
    # 270 matrices and two of zeros.
    assert record.bytes == share * 272 / 270, record
  assert memory_report(program)["temp"] < 3 * share


@pytest.mark.parametrize("count", [16, 7])
def test_what_all_have_is_shared_if_it_is_enough(auto_mesh, count):
  sizes = dict(layers=count, embed=32, scores=8)
  stacks = {"router": (sizes, ("embed", "scores"), P())}
  program = compiled(auto_mesh, stacks)
  records, text = collectives(program), program.as_text()
  if count < 8:
    assert not records and f"f32[{count},8,8]" in text
    return
  assert collective_counts(records) == {"all-gather": 1}
  assert records[0].bytes == 4 * count * 32 * 8
  # The squares of a device's two matrices, not of all sixteen.
  assert "f32[2,8,8]" in text and f"f32[{count},8,8]" not in text
