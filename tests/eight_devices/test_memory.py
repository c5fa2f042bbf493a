"""The memory from tokens to the residual update: no mesh, Auto, Explicit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding

import engram_jax
from engram_jax import sharding
from engram_jax.errors import InputError
from engram_jax.fusion.over_encoding import OverEncoding
from engram_jax.memory import exchange

VOCAB, BATCH, LENGTH = 64, 8, 12
CONFIG = engram_jax.EngramConfig(
  hidden_size=16,
  layers=(1,),
  rows_per_head=(50, 50),
  heads=2,
  head_dim=4,
  pad_id=0,
  streams=2,
)
COMPRESSION = engram_jax.TokenCompression.identity(VOCAB)
HASHING = engram_jax.NgramHash.create(
  vocab_size=VOCAB,
  rows_per_head=CONFIG.rows_per_head,
  heads=CONFIG.heads,
  layers=CONFIG.layers,
  pad_id=0,
)


def remember(table, tokens, breaks, hidden, engram, *, across: bool):
  canonical = COMPRESSION(tokens)
  row_ids = HASHING.row_ids(canonical, 1, breaks=breaks)
  history = HASHING.next_history(canonical, breaks=breaks)
  following = HASHING.row_ids(canonical, 1, history=history)
  if across:
    rows = exchange.lookup({1: table}, {1: row_ids})[0][1]
  else:
    rows = engram_jax.lookup(table, row_ids)

  def loss(engram, hidden, rows):
    update, state = engram(hidden, rows, breaks=breaks)
    return jnp.sum(jnp.square(update)), (update, state)

  gradients, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(
    engram, hidden, rows
  )
  return row_ids, following, history, rows, out, gradients


@pytest.mark.parametrize("across", [False, True])
def test_it_is_the_same_everywhere(any_mesh, across):
  rng = np.random.default_rng(0)
  rows = sharding.padded_rows(HASHING.num_rows[1], 8)
  table = rng.normal(size=(rows, 4)).astype(np.float32)
  tokens = rng.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)
  breaks = (rng.random((BATCH, LENGTH)) < 0.2).astype(np.int8)
  hidden = rng.normal(size=(BATCH, LENGTH, 2, 16)).astype(np.float32)
  engram = engram_jax.Engram(CONFIG, rngs=nnx.Rngs(0))
  batch = (tokens, breaks, hidden)
  wanted = jax.jit(remember, static_argnames="across")(
    *jax.device_put((table, *batch)), engram, across=False
  )

  def place(x, spec):
    return jax.device_put(x, NamedSharding(any_mesh, spec))

  with jax.set_mesh(any_mesh):
    found = jax.jit(remember, static_argnames="across")(
      place(table, sharding.TABLE),
      *(place(x, sharding.TOKENS) for x in batch),
      jax.device_put(engram, NamedSharding(any_mesh, sharding.P())),
      across=across,
    )

  def same(a, b):
    # Sums of many terms, rounded in another order: against the largest.
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-5 * np.abs(b).max())

  jax.tree.map(same, jax.device_get(found), jax.device_get(wanted))


def test_a_row_optimizer_may_see_its_first_update_on_a_mesh(any_mesh):
  """It tries itself out on a small table: not in the mesh's program."""
  memory = engram_jax.Memory.create(CONFIG, vocab_size=VOCAB)
  tokens = np.zeros((BATCH, LENGTH), np.int32)
  couples = engram_jax.row_sparse(optax.clip_by_global_norm(1.0))

  def step(row_tx, tables):
    found = memory.lookup(tables, tokens)
    return memory.update(
      row_tx,
      tables,
      {1: row_tx.init(tables[1])},
      found,
      jax.tree.map(jnp.ones_like, found.rows),
      learning_rate=0.1,
    )

  with jax.set_mesh(any_mesh):
    tables = memory.init_tables(jax.random.key(0))
    row_tx = engram_jax.row_sparse(optax.scale_by_adam())
    moved, _ = jax.jit(lambda tables: step(row_tx, tables))(tables)
    assert (moved[1] != tables[1]).any()
    with pytest.raises(InputError, match="couples rows"):
      jax.jit(lambda tables: step(couples, tables))(tables)


def test_a_step_of_memory_alone_is_that_of_one_device(any_mesh):
  memory = engram_jax.Memory.create(CONFIG, vocab_size=VOCAB)
  row_tx = engram_jax.row_sparse(optax.scale_by_adam())
  rng = np.random.default_rng(1)
  tokens = rng.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)

  def step(tables, states, tokens, *, capacity=None, strategy=None):
    found = memory.lookup(tables, tokens, strategy=strategy, capacity=capacity)
    gradients = jax.tree.map(jnp.sin, found.rows)
    tables, states = memory.update(
      row_tx, tables, states, found, gradients, learning_rate=0.1
    )
    needed = 0 if found.capacity is None else found.capacity_needed
    return tables, states, jnp.asarray(found.is_complete), jnp.asarray(needed)

  step = jax.jit(step, static_argnames=("capacity", "strategy"))
  alone = memory.init_tables(jax.random.key(0))
  rows = memory.num_rows[1]
  wanted, *_ = step(alone, memory.init_optimizer(row_tx, alone), tokens)

  with jax.set_mesh(any_mesh):
    tables = memory.init_tables(jax.random.key(0))
    assert tables[1].sharding.spec == sharding.TABLE
    np.testing.assert_allclose(tables[1][:rows], alone[1], rtol=1e-6)
    states = memory.init_optimizer(row_tx, tables)
    assert states[1].mu.sharding.spec == sharding.TABLE
    placed = jax.device_put(tokens, NamedSharding(any_mesh, sharding.TOKENS))
    start = np.asarray(tables[1])

    # Without a capacity every batch is complete.
    found, _, complete, _ = step(tables, states, placed)
    assert complete
    np.testing.assert_allclose(found[1][:rows], wanted[1], rtol=1e-5, atol=1e-6)
    assert not np.asarray(found[1][rows:]).any()

    # With too small a one nothing moves, and what it takes is known.
    same, kept, complete, needed = step(
      tables, states, placed, capacity=1, strategy="exchange"
    )
    assert not complete and needed > 1
    np.testing.assert_array_equal(same[1], start)
    assert int(kept[1].count) == 0
    found, _, complete, _ = step(
      tables, states, placed, capacity=int(needed), strategy="exchange"
    )
    assert complete
    np.testing.assert_allclose(found[1][:rows], wanted[1], rtol=1e-5, atol=1e-6)


OPTIONS = {
  "one row": dict(addressing="one_row"),
  "shuffled": dict(addressing="shuffled"),
  "unigrams": dict(smallest_order=1, rows_per_head=(50,)),
  "no gate": dict(gate=False),
  "one key": dict(per_stream_keys=False),
  "input average": dict(fusion="input_average", layers=(0,), short_conv=False),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_is_the_same_everywhere(any_mesh, options):
  config = dataclasses.replace(CONFIG, **options)
  memory = engram_jax.Memory.create(config, vocab_size=VOCAB)
  gated = config.fusion == "gated"
  fusion = (engram_jax.Engram if gated else OverEncoding)(
    config, rngs=nnx.Rngs(0)
  )
  (layer,) = config.layers
  rng = np.random.default_rng(2)
  tokens = rng.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)
  breaks = (rng.random((BATCH, LENGTH)) < 0.2).astype(np.int8)
  hidden = rng.normal(size=(BATCH, LENGTH, 2, 16)).astype(np.float32)

  @jax.jit
  def update(fusion, tables, tokens, breaks, hidden):
    found = memory.lookup(tables, tokens, breaks=breaks)
    fused = fusion.fuse(hidden, found.rows[layer], breaks=breaks)
    return found.row_ids[layer], fused.update, fused.gates

  alone = memory.init_tables(jax.random.key(0))
  wanted = update(fusion, alone, tokens, breaks, hidden)
  np.testing.assert_array_equal(
    wanted[0], memory.row_ids_numpy(tokens, breaks=breaks)[layer]
  )
  by_tokens = NamedSharding(any_mesh, sharding.TOKENS)
  with jax.set_mesh(any_mesh):
    found = update(
      jax.device_put(fusion, NamedSharding(any_mesh, sharding.P())),
      memory.init_tables(jax.random.key(0)),
      *(jax.device_put(x, by_tokens) for x in (tokens, breaks, hidden)),
    )
  for one, other in zip(jax.device_get(found), wanted):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
