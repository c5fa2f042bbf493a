"""What `analysis.compiled` reads in real programs for eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from engram_jax import sharding
from engram_jax.analysis.compiled import (
  collective_bytes,
  collective_counts,
  collectives,
  copies,
  memory_report,
  of_table,
)
from engram_jax.run_config import MeshConfig

ROWS, WIDTH = 8 * 16, 4
AXES = sharding.AXES
#: Bytes of one device's part.
PART = 16 * WIDTH * 4


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(MeshConfig(2, 2, 2))


def compiled(mesh, body, *, out=sharding.TABLE, donate=()):
  """`body` on the parts [16, 4] of an array that is spread over all devices."""
  f = jax.shard_map(
    body, mesh=mesh, in_specs=sharding.TABLE, out_specs=out, check_vma=False
  )
  x = jax.ShapeDtypeStruct(
    (ROWS, WIDTH), jnp.float32, sharding=NamedSharding(mesh, sharding.TABLE)
  )
  return jax.jit(f, donate_argnums=donate).lower(x).compile()


def all_to_all(x):
  return lax.all_to_all(x.reshape(8, 2, -1), AXES, 0, 0, tiled=True)


RING = [(i, (i + 1) % 2) for i in range(2)]
CASES = {
  "all-gather": (lambda x: lax.all_gather(x, AXES, tiled=True) * 2, P(), 8),
  "reduce-scatter": (
    lambda x: lax.psum_scatter(x, AXES, tiled=True),
    sharding.TABLE,
    1,
  ),
  "all-reduce": (lambda x: lax.psum(x, AXES), P(), 1),
  "all-to-all": (lambda x: all_to_all(x).reshape(x.shape), sharding.TABLE, 1),
  "collective-permute": (
    lambda x: lax.ppermute(x, "data", RING),
    sharding.TABLE,
    1,
  ),
}


@pytest.mark.parametrize("kind", CASES)
def test_each_kind(mesh, kind):
  body, out, parts = CASES[kind]
  program = compiled(mesh, body, out=out)
  (record,) = collectives(program)
  assert (record.kind, record.dtype, record.count) == (kind, "f32", 1)
  assert record.bytes == parts * PART
  assert sum(np.prod(shape) * 4 for _, shape in record.arrays) == record.bytes
  assert not record.in_loop
  assert collectives(program.as_text()) == [record]


def test_of_table(mesh):
  def found(body, out):
    records = collectives(compiled(mesh, body, out=out))
    return of_table(records, rows=ROWS, width=WIDTH, devices=8)

  for kind in ("all-gather", "all-reduce", "collective-permute"):
    body, out, _ = CASES[kind]
    assert found(body, out), kind
  # Reading a few rows of everyone's sends no part of a table.
  assert not found(lambda x: lax.psum(x[:3], AXES), P())


def test_counts_and_loops(mesh):
  def body(x):
    def step(x, _):
      return lax.psum(x, "tensor") * 0.5, None

    x, _ = lax.scan(step, x, length=3)
    return lax.cond(x[0, 0] > 0, lambda x: lax.psum(x, AXES), lambda x: x, x)

  records = collectives(compiled(mesh, body))
  assert sorted(r.in_loop for r in records) == [False, True]
  assert collective_counts(records) == {"all-reduce": 2}
  assert collective_bytes(records) == {"all-reduce": (3 + 1) * PART}


def test_memory_is_per_device(mesh):
  report = memory_report(compiled(mesh, lambda x: x.at[3].add(1), donate=0))
  assert report["argument"] == report["output"] == report["alias"] == PART


def test_a_copy_shows_what_donation_saves(mesh):
  # One row of an array that is needed afterwards: it must be copied first.
  write = lambda x: x.at[lax.axis_index("data")].set(1)
  records = [copies(compiled(mesh, write, donate=d)) for d in ((), (0,))]
  moved = [of_table(r, rows=ROWS, width=WIDTH, devices=8) for r in records]
  assert moved[0] and not moved[1]
