"""The loss in chunks on eight devices against one, and what travels for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from engram_jax import sharding
from engram_jax.analysis.compiled import collectives
from engram_jax.backbone.layers import VOCABULARY
from engram_jax.errors import InputError
from engram_jax.run_config import MeshConfig
from engram_jax.training.losses import chunked_cross_entropy

B, L, D, V = 8, 6, 16, 48


def draw(vocab=V, dtype="float32"):
  """Hidden states, matrix, targets, mask."""
  rng = np.random.default_rng(0)
  return (
    jnp.asarray(rng.normal(size=(B, L, D)), dtype),
    jnp.asarray(rng.normal(size=(vocab, D)), jnp.float32),
    jnp.asarray(rng.integers(0, vocab, (B, L)), jnp.int32),
    jnp.asarray(rng.random((B, L)) < 0.8),
  )


def place(mesh, arrays):
  """Tokens over the batch, the matrix as the parameter is."""
  of_matrix = sharding.parameter_spec(VOCABULARY, arrays[1].shape, mesh)
  tokens = sharding.TOKENS
  return tuple(
    jax.device_put(x, NamedSharding(mesh, spec))
    for x, spec in zip(arrays, (tokens, of_matrix, tokens, tokens))
  )


@functools.cache
def value_and_grad(mesh, *, chunk, dtype="float32"):
  def loss(*arrays):
    with sharding.use(mesh):
      return chunked_cross_entropy(*arrays, chunk=chunk, dtype=dtype)

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


# Chunks that fit a device's tokens and not; the last vocabulary is one that no
# mesh divides.
@pytest.mark.parametrize(("chunk", "vocab"), [(2, V), (5, V), (100, 47)])
def test_as_on_one_device(auto_mesh, chunk, vocab):
  assert_as_on_one_device(auto_mesh, chunk, vocab)


def test_as_on_one_device_with_explicit_axes():
  mesh = sharding.make_mesh(MeshConfig(2, 2, 2), axis_type=AxisType.Explicit)
  assert_as_on_one_device(mesh, 2, V)


def assert_as_on_one_device(mesh, chunk, vocab):
  arrays = draw(vocab)
  expected, by = value_and_grad(None, chunk=7)(*arrays)
  placed = place(mesh, arrays)
  found, found_by = value_and_grad(mesh, chunk=chunk)(*placed)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  for one, other, like in zip(found_by, by, placed):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert one.dtype == like.dtype
  # The matrix's gradient is where the matrix is.
  of_matrix, like = found_by[1].sharding, placed[1].sharding
  assert of_matrix.is_equivalent_to(like, 2)


def test_gradients_are_summed_in_float32(auto_mesh):
  arrays = draw(dtype="bfloat16")
  options = {"chunk": 1, "dtype": "bfloat16"}
  expected, by = value_and_grad(None, **options)(*arrays)
  found, found_by = value_and_grad(auto_mesh, **options)(
    *place(auto_mesh, arrays)
  )
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  np.testing.assert_array_equal(found_by[0], by[0])
  # The same products of one token each; only the order of the sum differs.
  assert found_by[1].dtype == jnp.float32
  np.testing.assert_allclose(found_by[1], by[1], rtol=1e-5, atol=1e-6)


def test_the_matrix_travels_once(auto_mesh):
  placed = place(auto_mesh, draw())
  # Three chunks or more on each device.
  program = value_and_grad(auto_mesh, chunk=1).lower(*placed).compile()
  assert " while(" in program.as_text()
  records = collectives(program)
  assert not any(record.in_loop for record in records)
  counts = {kind: 0 for kind in ("all-gather", "reduce-scatter")}
  for record in records:
    if record.kind in counts and V in record.shape:
      counts[record.kind] += record.count
  assert counts == {"all-gather": 1, "reduce-scatter": 1}


def test_tokens_are_not_counted_twice():
  """Nor is their work done twice: a tensor group shares the sequence."""
  arrays = draw()
  flops = {}
  for shape in ((2, 1, 1), (2, 1, 2)):
    devices = jax.devices()[: np.prod(shape)]
    mesh = sharding.make_mesh(MeshConfig(*shape), devices=devices)
    loss = value_and_grad(mesh, chunk=100)
    program = loss.lower(*place(mesh, arrays)).compile()
    flops[shape] = program.cost_analysis()["flops"]
  assert flops[2, 1, 2] < 0.6 * flops[2, 1, 1]


@pytest.mark.parametrize(
  ("shape", "message"),
  [
    ((8, 1, 1), r"^hidden.shape\[0\]: 4; valid: .*mesh.data \* mesh.expert ="),
    ((2, 1, 4), r"^hidden.shape\[1\]: 6; valid: a multiple of mesh.tensor = 4"),
  ],
)
def test_what_the_mesh_does_not_divide(shape, message):
  mesh = sharding.make_mesh(MeshConfig(*shape))
  arrays = tuple(x if x.shape[0] == V else x[:4] for x in draw())
  with pytest.raises(InputError, match=message):
    value_and_grad(mesh, chunk=2).lower(*arrays)
