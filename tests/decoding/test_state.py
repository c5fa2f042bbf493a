"""A step at a time equals the whole sequence, for prompts of any lengths."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.decoding.decoders import Decoder
from engram_jax.decoding.state import init_state
from engram_jax.decoding.weights import for_decoding
from engram_jax.errors import InputError
from engram_jax.memory.hashing import NgramHash
from engram_jax.memory.memory import Memory

# All tests share programs and sizes, so that each is compiled once.
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
  decoder = Decoder(*every_tiny.parts)
  state = decoder.init_state(BATCH, CAPACITY)
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
      logits, state = decoder.start(state, new)()
      seen = seen + 1
    else:
      chunk = padded(ids, seen, lengths)
      logits, state = decoder.start(state, *chunk)()
      seen = seen + lengths
    check(logits)
  assert seen.tolist() == [14, 13, 13]


def test_a_sequence_does_not_feel_its_neighbour(tiny):
  results, decoder = [], Decoder(*tiny.parts)
  for seed in (1, 2):
    ids = np.concatenate([tokens(0, 1), tokens(seed, 2)])
    state = decoder.init_state(BATCH, CAPACITY)
    chunk = padded(ids, (0, 0, 0), (3, 1 + seed, 2))
    first, state = decoder.start(state, *chunk)()
    new = jnp.asarray(ids[:, 3])
    second, state = decoder.start(state, new)()
    results.append((first[0], second[0], state.history[0]))
  for one, other in zip(*results):
    np.testing.assert_array_equal(one, other)


def test_history_holds_the_last_canonical_ids(tiny):
  decoder = Decoder(*tiny.parts)
  state = decoder.init_state(BATCH, CAPACITY)
  np.testing.assert_array_equal(state.history, np.full((BATCH, 2), -1))
  prompts = ([6, 7, 8, 9], [10], [11, 12])
  chunk = padded(prompts, (0, 0, 0), (4, 1, 2))
  _, state = decoder.start(state, *chunk)()
  np.testing.assert_array_equal(state.history, [[4, 4], [-1, 5], [5, 6]])


def test_memory_off_leaves_the_memory_out(tiny):
  ids, lengths = jnp.asarray(tokens(3)), jnp.full(BATCH, LENGTH, jnp.int32)
  decoder = Decoder(tiny.model, None, None)
  state = decoder.init_state(BATCH, CAPACITY)
  assert state.history is None
  logits, state = decoder.start(state, ids, lengths)()
  off = tiny.logits(ids, memory=False)[:, -1]
  np.testing.assert_allclose(logits, off, rtol=1e-4, atol=1e-4)
  assert np.abs(off - tiny.logits(ids)[:, -1]).max() > 0.1


def test_refusals(tiny, tiny_plain):
  def start(model=tiny.model, memory=tiny.memory, batch=2, capacity=CAPACITY):
    model = for_decoding(model)
    return init_state(model, memory, batch=batch, capacity=capacity)

  def refused(match):
    return pytest.raises(InputError, match=match)

  with refused("batch: 0; valid: an integer >= 1"):
    start(batch=0)
  with refused("capacity: 0"):
    start(capacity=0)
  with refused(r"memory.layers: \(0, 2\); valid: .*\[\]"):
    start(model=tiny_plain.model)
  hashing = NgramHash.create(
    vocab_size=12, rows_per_head=(60, 70), heads=2, layers=(0, 1), pad_id=0
  )
  config = dataclasses.replace(tiny.memory.config, layers=(0, 1))
  other = Memory(config, tiny.compression, hashing)
  with refused(r"memory.layers: \(0, 1\); valid: .*\[0, 2\]"):
    start(memory=other)
  with refused(r"memory.layers: \(0, 1\); valid: .*\[0, 2\]"):
    Decoder(tiny.model, other, tiny.store)
  with refused("store: None; valid: a store with a memory, and None without"):
    Decoder(tiny.model, tiny.memory, None)
  with refused("store: TableStore; valid: a store with a memory, and None"):
    Decoder(tiny.model, None, tiny.store)

  def fill(state, memory=tiny.memory, store=tiny.store):
    ids = np.ones((2, 4), np.int32)
    Decoder(tiny.model, memory, store).start(state, ids, np.array([2, 4]))

  with refused("memory: None; valid: the memory that"):
    fill(start(), None, None)
  with refused("state.history: None"):
    fill(start(memory=None))


def test_the_state_is_a_pytree_of_arrays(every_tiny):
  decoder = Decoder(*every_tiny.parts)
  state = decoder.init_state(BATCH, CAPACITY)
  leaves = jax.tree.leaves(state)
  assert all(leaf.shape[0] == BATCH for leaf in leaves)
  tree = jax.tree.structure(state)
  shapes = [(leaf.shape, leaf.dtype) for leaf in leaves]
  _, after = decoder.start(state, np.ones(BATCH, np.int32))()
  assert jax.tree.structure(after) == tree
  assert [(x.shape, x.dtype) for x in jax.tree.leaves(after)] == shapes
