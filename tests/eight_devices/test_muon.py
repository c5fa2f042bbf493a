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
from engram_jax.training.muon import muon

BATCH = sharding.BATCH
#: Shape and layout by name: counts that eight devices do not divide, fewer
#: than there are, sides of several axes, and what every device has whole.
STACKS = {
  "moe_blocks/ffn/gate": (
    (5, 4, 16, 8),
    P(None, "expert", "data", "tensor"),
  ),
  "moe_blocks/ffn/down": (
    (5, 4, 8, 16),
    P(None, "expert", "tensor", "data"),
  ),
  "moe_blocks/attention/query": ((5, 16, 2, 6), P(None, BATCH)),
  "moe_blocks/attention/out": ((9, 2, 6, 16), P(None, None, None, BATCH)),
  "dense_blocks/ffn/gate": ((1, 16, 8), P(None, BATCH, "tensor")),
  "engrams/0/projection": ((12, 3, 16), P(None, None, BATCH)),
  "moe_blocks/ffn/router": ((9, 16, 4), P()),
  "moe_blocks/ffn_streams/kernel": ((5, 16, 4), P()),
}
EXPERTS = {
  "moe_blocks/ffn/gate": (
    (30, 9, 64, 32),
    P(None, None, "data", ("expert", "tensor")),
  )
}
STEPS = 3


def optimizer_of(stacks):
  def spec_of(path, leaf, mesh):
    del mesh
    shape, spec = stacks[sharding.parameter_name(path)]
    assert leaf.shape == shape
    return spec

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
  drawn = [
    {k: rng.normal(size=s).astype(np.float32) for k, (s, _) in STACKS.items()}
    for _ in range(1 + STEPS)
  ]
  return drawn, run(None, drawn[0], drawn[1:])


def test_as_on_one_device(auto_mesh, whole):
  drawn, (params, state) = whole
  shardings = {
    name: NamedSharding(auto_mesh, spec) for name, (_, spec) in STACKS.items()
  }
  placed = [jax.device_put(tree, shardings) for tree in drawn]
  found, moments = run(auto_mesh, placed[0], placed[1:])
  for name in STACKS:
    assert found[name].sharding.is_equivalent_to(
      shardings[name], found[name].ndim
    ), name
    np.testing.assert_allclose(
      found[name], params[name], atol=1e-5, err_msg=name
    )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), moments, state
  )


def compiled(mesh, stacks):
  """One update of donated gradients and momentum."""
  shapes = {
    name: jax.ShapeDtypeStruct(
      shape, jnp.float32, sharding=NamedSharding(mesh, spec)
    )
    for name, (shape, spec) in stacks.items()
  }
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
  ((shape, _),) = EXPERTS.values()
  program = compiled(auto_mesh, EXPERTS)
  share = 4 * math.prod(shape) // 8
  records = collectives(program)
  assert collective_counts(records).keys() == {"all-to-all"}
  for record in records:
    # 270 matrices and two of zeros.
    assert record.bytes == share * 272 / 270, record
  assert memory_report(program)["temp"] < 3 * share


@pytest.mark.parametrize("count", [16, 7])
def test_what_all_have_is_shared_if_it_is_enough(auto_mesh, count):
  stacks = {"moe_blocks/ffn/router": ((count, 32, 8), P())}
  program = compiled(auto_mesh, stacks)
  records, text = collectives(program), program.as_text()
  if count < 8:
    assert not records and f"f32[{count},8,8]" in text
    return
  assert collective_counts(records) == {"all-gather": 1}
  assert records[0].bytes == 4 * count * 32 * 8
  # The squares of a device's two matrices, not of all sixteen.
  assert "f32[2,8,8]" in text and f"f32[{count},8,8]" not in text
