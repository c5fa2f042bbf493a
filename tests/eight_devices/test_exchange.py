"""Rows looked up on all devices, and their gradients, against one array."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from engram_jax import sharding
from engram_jax.errors import InputError
from engram_jax.memory import exchange
from engram_jax.memory.row_sparse import row_sparse, sum_duplicates
from engram_jax.memory.row_transformations import scale_by_adam_per_row


def zipf_ids(seed: int, shape: tuple[int, ...], below: int) -> np.ndarray:
  """int32 ids of which few are frequent, scattered over 0 .. below - 1."""
  rng = np.random.default_rng(seed)
  ranks = (rng.zipf(1.3, shape) - 1) % below
  return rng.permutation(below)[ranks].astype(np.int32)


SHAPE, WIDTH = (8, 16, 3), 4
NUM_ROWS = {1: 160, 3: 240}
IDS = {
  "random": lambda layer, rows: np.random.default_rng(layer).integers(
    0, rows, SHAPE, dtype=np.int32
  ),
  "zipf": lambda layer, rows: zipf_ids(layer, SHAPE, rows),
  "one row": lambda layer, rows: np.full(SHAPE, rows - 1, np.int32),
  # All of them on the device in the middle.
  "one shard": lambda layer, rows: np.random.default_rng(layer).integers(
    4 * rows // 8, 5 * rows // 8, SHAPE, dtype=np.int32
  ),
}


def place(arrays, mesh, spec):
  named = NamedSharding(mesh, spec)
  return {i: jax.device_put(x, named) for i, x in arrays.items()}


@pytest.fixture(params=IDS)
def ids(request):
  return {i: IDS[request.param](i, rows) for i, rows in NUM_ROWS.items()}


@pytest.fixture
def tables():
  return {
    i: jax.random.normal(jax.random.key(i), (rows, WIDTH))
    for i, rows in NUM_ROWS.items()
  }


@pytest.fixture
def gradients():
  return {
    i: jax.random.normal(jax.random.key(10 + i), (*SHAPE, WIDTH))
    for i in NUM_ROWS
  }


def dense(row_gradients, layer):
  """[R, d] of what lies at the owners; each row must be there once."""
  shard = NUM_ROWS[layer] // 8
  ids = np.asarray(row_gradients.row_ids).reshape(8, -1)
  values = np.asarray(row_gradients.values).reshape(8, -1, WIDTH)
  whole = np.zeros((NUM_ROWS[layer], WIDTH), np.float32)
  for owner in range(8):
    here = ids[owner] < shard
    assert len(set(ids[owner][here])) == here.sum()
    assert not values[owner][~here].any()
    whole[owner * shard + ids[owner][here]] = values[owner][here]
  return whole


@functools.cache
def compiled(mesh, strategy, capacity):
  @jax.jit
  def run(tables, ids, gradients):
    with sharding.use(mesh):
      rows, plan = exchange.lookup(
        tables, ids, strategy=strategy, capacity=capacity
      )
      owned = exchange.reduce_row_gradients(plan, gradients, num_rows=NUM_ROWS)
      return rows, plan.needed, owned

  return run


def there_and_back(
  mesh, tables, ids, gradients, *, strategy="exchange", capacity=None
):
  """Rows, what was needed, and gradients at their owners."""
  return compiled(mesh, strategy, capacity)(
    place(tables, mesh, sharding.TABLE),
    place(ids, mesh, sharding.TOKENS),
    place(gradients, mesh, sharding.TOKENS),
  )


@pytest.mark.parametrize("strategy", exchange.STRATEGIES)
def test_rows_and_gradients(auto_mesh, strategy, tables, ids, gradients):
  rows, _, owned = there_and_back(
    auto_mesh, tables, ids, gradients, strategy=strategy
  )
  for layer, table in tables.items():
    np.testing.assert_array_equal(rows[layer], table[ids[layer]])
    wanted = jnp.zeros_like(table).at[ids[layer]].add(gradients[layer])
    np.testing.assert_allclose(dense(owned[layer], layer), wanted, atol=2e-5)


@pytest.mark.parametrize("strategy", exchange.STRATEGIES)
def test_auto_and_explicit_axes(any_mesh, strategy, tables):
  ids = {i: IDS["zipf"](i, rows) for i, rows in NUM_ROWS.items()}
  with jax.set_mesh(any_mesh):
    rows, _ = jax.jit(
      lambda *arguments: exchange.lookup(*arguments, strategy=strategy)
    )(
      place(tables, any_mesh, sharding.TABLE),
      place(ids, any_mesh, sharding.TOKENS),
    )
  for layer, table in tables.items():
    np.testing.assert_array_equal(rows[layer], table[ids[layer]])


@pytest.mark.parametrize("strategy", exchange.STRATEGIES)
def test_autodiff_agrees(auto_mesh, strategy, tables, gradients):
  """JAX's own transpose: a dense gradient, laid out as the table."""
  ids = {i: IDS["zipf"](i, rows) for i, rows in NUM_ROWS.items()}
  placed = place(ids, auto_mesh, sharding.TOKENS)

  def loss(tables, ids):
    rows, _ = exchange.lookup(tables, ids, strategy=strategy)
    return sum(jnp.sum(rows[i] * gradients[i]) for i in rows)

  with jax.set_mesh(auto_mesh):
    found = jax.jit(jax.grad(loss))(
      place(tables, auto_mesh, sharding.TABLE), placed
    )
  for layer, table in tables.items():
    wanted = jnp.zeros_like(table).at[ids[layer]].add(gradients[layer])
    np.testing.assert_allclose(found[layer], wanted, atol=2e-5)
    named = NamedSharding(auto_mesh, sharding.TABLE)
    assert found[layer].sharding.is_equivalent_to(named, 2)


def test_needed_is_what_is_enough(auto_mesh, tables, ids, gradients):
  _, needed, _ = there_and_back(auto_mesh, tables, ids, gradients)
  batch = sharding.size(auto_mesh, *sharding.BATCH)
  tensor = sharding.size(auto_mesh, sharding.TENSOR)
  most = 0
  for layer, rows in NUM_ROWS.items():
    for part in np.split(ids[layer], batch):
      for piece in np.split(part, tensor, axis=1):
        owners = np.unique(piece) // (rows // 8)
        most = max(most, np.bincount(owners).max())
  assert needed == most
  rows, again, _ = there_and_back(
    auto_mesh, tables, ids, gradients, capacity=int(needed)
  )
  assert again == needed
  for layer, table in tables.items():
    np.testing.assert_array_equal(rows[layer], table[ids[layer]])


def test_too_little_room_is_told(auto_mesh, tables, gradients):
  ids = {i: IDS["one shard"](i, rows) for i, rows in NUM_ROWS.items()}
  _, needed, _ = there_and_back(auto_mesh, tables, ids, gradients, capacity=1)
  assert needed > 1


def test_bfloat16_rows(auto_mesh, tables, gradients):
  ids = {i: IDS["zipf"](i, rows) for i, rows in NUM_ROWS.items()}
  tables = {i: t.astype(jnp.bfloat16) for i, t in tables.items()}
  gradients = {i: g.astype(jnp.bfloat16) for i, g in gradients.items()}
  rows, _, owned = there_and_back(auto_mesh, tables, ids, gradients)
  for layer, table in tables.items():
    assert rows[layer].dtype == jnp.bfloat16
    np.testing.assert_array_equal(rows[layer], table[ids[layer]])
    wanted = jnp.zeros(table.shape).at[ids[layer]].add(gradients[layer])
    # Duplicates of one device travel as one float32 sum.
    np.testing.assert_allclose(dense(owned[layer], layer), wanted, atol=2e-5)


def test_lazy_adam_where_the_rows_live(auto_mesh, tables, gradients):
  ids = {i: IDS["zipf"](i, rows) for i, rows in NUM_ROWS.items()}
  optimizer = row_sparse(scale_by_adam_per_row())
  placed = place(tables, auto_mesh, sharding.TABLE)
  row_ids = place(ids, auto_mesh, sharding.TOKENS)
  named = place(gradients, auto_mesh, sharding.TOKENS)

  @jax.jit
  def step(tables, states, gradients):
    with sharding.use(auto_mesh):
      _, plan = exchange.lookup(tables, row_ids, strategy="exchange")
      owned = exchange.reduce_row_gradients(plan, gradients, num_rows=NUM_ROWS)
      return {
        i: exchange.update(optimizer, tables[i], states[i], owned[i], 0.1)
        for i in tables
      }

  states = {i: optimizer.init(t) for i, t in placed.items()}
  wanted = {i: (t, optimizer.init(t)) for i, t in tables.items()}
  found = {i: (placed[i], states[i]) for i in placed}
  for scale in (1.0, -0.5):
    now = {i: scale * g for i, g in named.items()}
    found = step(
      {i: t for i, (t, _) in found.items()},
      {i: s for i, (_, s) in found.items()},
      now,
    )
    for i in wanted:
      summed = sum_duplicates(
        jnp.asarray(ids[i]), scale * gradients[i], num_rows=NUM_ROWS[i]
      )
      wanted[i] = optimizer.update(*wanted[i], summed, 0.1)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, wanted
  )


def test_refusals(auto_mesh, tables):
  ids = {i: IDS["random"](i, rows) for i, rows in NUM_ROWS.items()}
  ids = {i: jnp.asarray(x) for i, x in ids.items()}
  with pytest.raises(InputError, match=r"^mesh: none; valid: "):
    exchange.lookup(tables, ids)
  with sharding.use(auto_mesh):
    with pytest.raises(InputError, match=r"^strategy: send; valid: one of"):
      exchange.lookup(tables, ids, strategy="send")
    with pytest.raises(InputError, match=r"^capacity: 0; valid: "):
      exchange.lookup(tables, ids, strategy="exchange", capacity=0)
    with pytest.raises(InputError, match=r"^tables: \[1\]; valid: .*\[1, 3\]"):
      exchange.lookup({1: tables[1]}, ids)
    uneven = tables | {1: tables[1][:-1]}
    with pytest.raises(InputError, match=r"shape\[0\]: 159; valid: a mult"):
      exchange.lookup(uneven, ids)
    with pytest.raises(InputError, match=r"^row_ids\[1\].shape: \(3, "):
      exchange.lookup(tables, ids | {1: ids[1][:3, :3]})
