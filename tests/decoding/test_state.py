"""A step at a time equals the whole sequence, for prompts of any lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.decoding.state import (
  decode_step,
  init_state,
  prefill,
)
from engram_jax.errors import InputError
from engram_jax.memory.compression import TokenCompression
from engram_jax.memory.hashing import NgramHash

# All tests share programs and sizes, so that each is compiled once.
_STATIC = ("hashing", "compression")
jit_prefill = jax.jit(prefill, static_argnames=_STATIC, donate_argnames="state")
jit_step = jax.jit(
  decode_step, static_argnames=_STATIC, donate_argnames="state"
)
BATCH, LENGTH = 3, 16
CAPACITY = LENGTH


def tokens(seed, batch=BATCH):
  ids = np.random.default_rng(seed).integers(1, 24, (batch, LENGTH))
  return ids.astype(np.int32)


def padded(ids, starts, lengths):
  """Each row's tokens from its start on, padded with garbage."""
  chunk = np.full((len(ids), LENGTH), 17, np.int32)
  for row, source, start, n in zip(chunk, ids, starts, lengths):
    row[:n] = source[start : start + n]
  return jnp.asarray(chunk), jnp.asarray(lengths, jnp.int32)


def test_prefill_and_steps_equal_the_whole_sequence(every_tiny):
  ids = tokens(0)
  whole = every_tiny.logits(jnp.asarray(ids))
  model, hashing = every_tiny.model, every_tiny.hashing
  state = init_state(model, hashing, batch=BATCH, capacity=CAPACITY)
  seen = np.zeros(BATCH, int)

  def check(logits):
    expected = whole[np.arange(BATCH), seen - 1]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(state.cache.lengths, seen)

  # Prompts of unequal lengths, steps, and two more chunks in between.
  chunks = ((2, 5, 1), None, None, None, (4, 1, 6), (3, 2, 1), None, None)
  for lengths in chunks:
    if lengths is None:
      new = jnp.asarray(ids[np.arange(BATCH), seen])
      logits, state = jit_step(*every_tiny.parts, state, new)
      seen = seen + 1
    else:
      chunk = padded(ids, seen, lengths)
      logits, state = jit_prefill(*every_tiny.parts, state, *chunk)
      seen = seen + lengths
    check(logits)
  assert seen.tolist() == [14, 13, 13]


def test_a_sequence_does_not_feel_its_neighbour(tiny):
  results = []
  for seed in (1, 2):
    ids = np.concatenate([tokens(0, 1), tokens(seed, 2)])
    state = init_state(tiny.model, tiny.hashing, batch=BATCH, capacity=CAPACITY)
    chunk = padded(ids, (0, 0, 0), (3, 1 + seed, 2))
    first, state = jit_prefill(*tiny.parts, state, *chunk)
    new = jnp.asarray(ids[:, 3])
    second, state = jit_step(*tiny.parts, state, new)
    results.append((first[0], second[0], state.history[0]))
  for one, other in zip(*results):
    np.testing.assert_array_equal(one, other)


def test_history_holds_the_last_canonical_ids(tiny):
  state = init_state(tiny.model, tiny.hashing, batch=BATCH, capacity=CAPACITY)
  np.testing.assert_array_equal(state.history, np.full((BATCH, 2), -1))
  prompts = ([6, 7, 8, 9], [10], [11, 12])
  chunk = padded(prompts, (0, 0, 0), (4, 1, 2))
  _, state = jit_prefill(*tiny.parts, state, *chunk)
  np.testing.assert_array_equal(state.history, [[4, 4], [-1, 5], [5, 6]])


def test_memory_off_leaves_the_memory_out(tiny):
  ids, lengths = jnp.asarray(tokens(3)), jnp.full(BATCH, LENGTH, jnp.int32)
  state = init_state(tiny.model, None, batch=BATCH, capacity=CAPACITY)
  assert state.history is None
  logits, state = jit_prefill(tiny.model, None, None, None, state, ids, lengths)
  off = tiny.logits(ids, memory=False)[:, -1]
  np.testing.assert_allclose(logits, off, rtol=1e-4, atol=1e-4)
  assert np.abs(off - tiny.logits(ids)[:, -1]).max() > 0.1


def test_refusals(tiny, tiny_plain):
  hashing = tiny.hashing

  def start(model=tiny.model, hashing=hashing, batch=2, capacity=CAPACITY):
    return init_state(model, hashing, batch=batch, capacity=capacity)

  def fill(*, parts=tiny.parts, state=None, lengths=(2, 4), ids=None):
    ids = jnp.ones((2, 4), jnp.int32) if ids is None else ids
    prefill(*parts, state or start(), ids, jnp.array(lengths))

  def refused(match):
    return pytest.raises(InputError, match=match)

  with refused("batch: 0; valid: an integer >= 1"):
    start(batch=0)
  with refused("capacity: 0"):
    start(capacity=0)
  with refused(r"hashing.layers: \(0, 2\); valid: .*\[\]"):
    start(model=tiny_plain.model)
  other = NgramHash.create(
    vocab_size=12, rows_per_head=(60, 70), heads=2, layers=(0, 1), pad_id=0
  )
  with refused(r"hashing.layers: \(0, 1\); valid: .*\[0, 2\]"):
    start(hashing=other)

  with refused(r"lengths: 0; valid: 1 <= id < 5"):
    fill(lengths=(2, 0))
  with refused(r"lengths: 5; valid: 1 <= id < 5"):
    fill(lengths=(5, 1))
  with refused(r"batch of tokens, lengths: .*; valid: .*\(3,\)"):
    fill(state=start(batch=3))
  with refused("tokens in the cache: 4; valid: 1 <= id < 4"):
    fill(state=start(capacity=3))
  model, tables, hashing, compression = tiny.parts
  with refused("hashing: None; valid: the hash that"):
    fill(parts=(model, None, None, None))
  with refused("state.history: None"):
    fill(state=start(hashing=None))
  with refused("compression.size: None; valid: .* 12"):
    fill(parts=(model, tables, hashing, None))
  with refused("compression.size: 24; valid: .* 12"):
    identity = TokenCompression.identity(24)
    fill(parts=(model, tables, hashing, identity))
  with refused("tables: "):
    fill(parts=(model, None, hashing, compression))


def test_the_state_is_a_pytree_of_arrays(every_tiny):
  state = init_state(
    every_tiny.model, every_tiny.hashing, batch=BATCH, capacity=CAPACITY
  )
  leaves = jax.tree.leaves(state)
  assert all(leaf.shape[0] == BATCH for leaf in leaves)
  tree = jax.tree.structure(state)
  new = jnp.ones(BATCH, jnp.int32)
  _, after = jax.eval_shape(
    lambda state: decode_step(*every_tiny.parts, state, new), state
  )
  assert jax.tree.structure(after) == tree
  shapes = [(leaf.shape, leaf.dtype) for leaf in leaves]
  assert [(x.shape, x.dtype) for x in jax.tree.leaves(after)] == shapes
