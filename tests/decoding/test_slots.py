"""Slots: who has finished makes room, and nobody else feels it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.decoding.decoders import Decoder
from engram_jax.decoding.generate import (
  NO_TOKEN,
  generate,
  generate_all,
  pad_prompts,
)
from engram_jax.decoding.slots import insert
from engram_jax.stores.host_stores import HostStore
from engram_jax.stores.open_store import open_store, pack_tables

KEY = jax.random.key(3)
PROMPTS = [
  [5, 6, 7, 8, 9],
  [20],
  [3, 1, 4],
  [11, 12],
  [2, 2, 2, 2, 2, 2, 2],
  [9, 8, 7, 6],
  [15],
]
STEPS = 6


@pytest.fixture(scope="module")
def together(tiny):
  """All prompts at once, greedy; then the same with an early end."""
  options = {"max_new_tokens": STEPS, "key": KEY}
  whole = generate_all(*tiny.parts, PROMPTS, **options)
  end_id = whole[0][2]
  return (
    whole,
    end_id,
    generate_all(*tiny.parts, PROMPTS, end_id=end_id, **options),
  )


def test_a_sequence_moves_in_whole_and_alone(every_tiny):
  decoder = Decoder(*every_tiny.parts)

  def prefilled(prompts):
    state = decoder.init_state(len(prompts), 16)
    return decoder.start(state, *pad_prompts(prompts, vocab_size=24))()

  _, state = prefilled(PROMPTS[:3])
  _, fresh = prefilled(PROMPTS[3:4])
  for slot in (0, 2):
    after = jax.jit(insert)(state, fresh, slot)
    for old, new, one in zip(*map(jax.tree.leaves, (state, after, fresh))):
      assert new.shape == old.shape and new.dtype == old.dtype
      np.testing.assert_array_equal(new[slot], one[0])
      for other in {0, 1, 2} - {slot}:
        np.testing.assert_array_equal(new[other], old[other])


@pytest.mark.parametrize("slots", [1, 3, 7, 9])
def test_as_many_at_once_as_there_are_slots_change_no_sequence(
  tiny, together, slots
):
  whole, end_id, ended = together
  options = {"max_new_tokens": STEPS, "key": KEY, "slots": slots}
  assert generate_all(*tiny.parts, PROMPTS, **options) == whole
  found = generate_all(*tiny.parts, PROMPTS, end_id=end_id, **options)
  assert found == ended != whole
  assert any(len(row) < STEPS for row in ended)


def test_draws_are_those_of_the_prompt_and_its_own_step(tiny, together):
  options = {"max_new_tokens": STEPS, "key": KEY, "temperature": 2.0}
  options |= {"end_id": together[1]}
  expected = generate_all(*tiny.parts, PROMPTS, **options)
  assert generate_all(*tiny.parts, PROMPTS, slots=3, **options) == expected


def test_no_more_than_the_slots_speak_and_none_stands_idle(tiny, together):
  _, end_id, ended = together
  steps = list(
    generate(
      *tiny.parts,
      PROMPTS,
      max_new_tokens=STEPS,
      key=KEY,
      end_id=end_id,
      slots=3,
    )
  )
  speaking = [int((step.tokens != NO_TOKEN).sum()) for step in steps]
  assert max(speaking) == 3 and sum(speaking) == sum(map(len, ended))
  # A slot is taken at the very next step, as long as somebody waits.
  started = {i for i, token in enumerate(steps[0].tokens) if token != NO_TOKEN}
  for step, count in zip(steps[1:], speaking[1:]):
    started |= {i for i, x in enumerate(step.tokens) if x != NO_TOKEN}
    if len(started) < len(PROMPTS):
      assert count == 3
  assert steps[-1].finished.tolist() == [row[-1] == end_id for row in ended]


def test_slots_and_a_store_with_a_cache(tiny, together):
  whole, end_id, ended = together
  del whole
  store = open_store(
    "host", tiny.tables, tiny.hashing, cache_bytes=5 * 2 * 4 * 4
  )
  found = generate_all(
    tiny.model,
    tiny.memory,
    store,
    PROMPTS,
    max_new_tokens=STEPS,
    key=KEY,
    end_id=end_id,
    slots=2,
  )
  assert found == ended
  assert store.by_layer[0].hits > 0


def test_a_prompt_that_waits_is_read_before_a_slot_is_free(tiny, together):
  store = open_store("host", tiny.tables, tiny.hashing)
  steps = generate(
    *(tiny.model, tiny.memory, store),
    PROMPTS[:3],
    max_new_tokens=STEPS,
    key=KEY,
    slots=1,
    prefetch=False,
  )
  reads = []
  found = [[], [], []]
  for step in steps:
    reads.append(store.statistics.reads)
    (speaker,) = np.flatnonzero(step.tokens != NO_TOKEN)
    found[speaker].append(int(step.tokens[speaker]))
  assert found == together[0][:3]
  # The first step: its own prompt, its next token, and the next prompt.
  assert reads[0] == 3 and reads[1] == 4
  assert reads[-1] == 3 * STEPS  # each prompt, and a token less than were drawn


def test_a_sequence_that_has_ended_reads_no_more_rows(tiny, together):
  _, end_id, ended = together
  short = min(range(len(PROMPTS)), key=lambda i: len(ended[i]))
  long = max(range(len(PROMPTS)), key=lambda i: len(ended[i]))
  assert len(ended[short]) < len(ended[long]) == STEPS
  asked = []

  class Noting(HostStore):
    def read(self, row_ids, *, buffers=None):
      asked.append({i: np.asarray(ids) for i, ids in row_ids.items()})
      return super().read(row_ids, buffers=buffers)

  store = Noting(*pack_tables(tiny.tables, tiny.hashing, "float32"))
  generate_all(
    *(tiny.model, tiny.memory, store),
    [PROMPTS[short], PROMPTS[long]],
    # Far beyond what the caches hold, if it went on to count.
    max_new_tokens=40,
    key=KEY,
    end_id=end_id,
    prefetch=False,
  )
  after = asked[1 + len(ended[short]) + 3 :]
  for layer in tiny.hashing.layers:
    assert len({tuple(x[layer][0].flat) for x in after}) <= 1


def test_insert_takes_any_tree():
  state = {"a": jnp.zeros((3, 2)), "b": (jnp.zeros(3, jnp.int32), None)}
  fresh = {"a": jnp.ones((1, 2)), "b": (jnp.full(1, 7, jnp.int32), None)}
  after = insert(state, fresh, 1)
  assert after["a"].tolist() == [[0, 0], [1, 1], [0, 0]]
  assert after["b"][0].tolist() == [0, 7, 0]
