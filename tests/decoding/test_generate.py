"""Generation against the full forward pass, batches, ends, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.decoding.forward import init_cache
from engram_jax.decoding.generate import (
  NO_TOKEN,
  generate,
  generate_all,
  pad_prompts,
)
from engram_jax.decoding.room import decoding_bytes
from engram_jax.decoding.weights import for_decoding
from engram_jax.errors import InputError, NonFiniteError
from engram_jax.stores.program_stores import TableStore

KEY = jax.random.key(0)
PROMPTS = [[5, 6, 7, 8, 9], [20], [3, 1, 4]]
STEPS = 6
# The tokens that may be drawn: neither the pad token nor the model's surplus.
DRAWN = slice(1, 24)


def recomputed(tiny, prompts, *, memory=True):
  """Greedy decoding without a cache: all from the start, every time."""
  rows = [list(prompt) for prompt in prompts]
  for _ in range(STEPS):
    ids = np.zeros((len(rows), 16), np.int32)
    for row, tokens in zip(ids, rows):
      row[: len(tokens)] = tokens
    logits = tiny.logits(jnp.asarray(ids), memory=memory)
    for b, tokens in enumerate(rows):
      best = logits[b, len(tokens) - 1, DRAWN].argmax()
      tokens.append(int(best) + DRAWN.start)
  return [row[len(prompt) :] for row, prompt in zip(rows, prompts)]


@pytest.fixture(scope="module")
def greedy(tiny):
  return generate_all(*tiny.parts, PROMPTS, max_new_tokens=STEPS, key=KEY)


def test_greedy_is_the_argmax_of_the_full_forward(tiny, greedy):
  assert greedy == recomputed(tiny, PROMPTS)
  assert len({tuple(row) for row in greedy}) == 3


def test_memory_off_and_a_model_without_memory(tiny, tiny_plain, greedy):
  options = {"max_new_tokens": STEPS, "key": KEY}
  off = generate_all(
    tiny.model, None, None, PROMPTS, vocab_size=24, pad_id=0, **options
  )
  assert off == recomputed(tiny, PROMPTS, memory=False) != greedy
  plain = generate_all(
    *tiny_plain.parts, PROMPTS, vocab_size=24, pad_id=0, **options
  )
  assert plain == recomputed(tiny_plain, PROMPTS)


def test_a_batch_equals_each_prompt_alone(tiny, greedy):
  # Three prompts at once or the same one three times: one compiled program.
  for i, prompt in enumerate(PROMPTS):
    alone = generate_all(
      *tiny.parts, [prompt] * 3, max_new_tokens=STEPS, key=KEY
    )
    assert alone == [greedy[i]] * 3


def test_sampling_does_not_feel_the_neighbours(tiny):
  def draw(prompts, seed=0, **options):
    key = jax.random.key(seed)
    return generate_all(
      *tiny.parts,
      prompts,
      max_new_tokens=STEPS,
      key=key,
      temperature=2.0,
      **options,
    )

  first = draw(PROMPTS)
  assert draw(PROMPTS) == first
  assert draw([PROMPTS[0], [9, 9], [8]])[0] == first[0]
  assert draw(PROMPTS, seed=1) != first
  # The same prompt three times: three streams, and every step its own.
  same = draw([PROMPTS[0]] * 3)
  assert len({tuple(row) for row in same}) == 3
  assert draw(PROMPTS, top_k=1) == generate_all(
    *tiny.parts, PROMPTS, max_new_tokens=STEPS, key=KEY
  )


def test_only_the_tokenizers_tokens_are_drawn(tiny):
  seen = set()
  for seed in range(6):
    key = jax.random.key(seed)
    for step in generate(
      *tiny.parts, PROMPTS, max_new_tokens=11, key=key, temperature=1e3
    ):
      seen.update(step.tokens.tolist())
  assert seen == set(range(1, 24))


def test_the_end_token_ends_its_sequence(tiny, greedy):
  # A token that the first sequence reaches before its last step.
  end_id = greedy[0][2]
  expected = []
  for row in greedy:
    end = row.index(end_id) + 1 if end_id in row else len(row)
    expected.append(row[:end])
  options = {"max_new_tokens": STEPS, "key": KEY, "end_id": end_id}
  steps = list(generate(*tiny.parts, PROMPTS, **options))
  assert generate_all(*tiny.parts, PROMPTS, **options) == expected
  assert expected[0][-1] == end_id and len(expected[0]) <= 3
  assert len(steps) == max(map(len, expected))
  for t, step in enumerate(steps):
    assert step.tokens.shape == step.finished.shape == (3,)
    for token, done, row in zip(*step, expected):
      assert token == (row[t] if t < len(row) else NO_TOKEN)
      assert done == (end_id in row and t + 1 >= len(row))
  # When all have ended nothing is computed any more.
  alone = generate(*tiny.parts, [PROMPTS[0]] * 3, **options)
  assert len(list(alone)) == len(expected[0])


def test_prompts_of_other_lengths_compile_nothing(tiny, greedy, compiled):
  other = [[2, 3], [4, 5, 6, 7, 8, 9, 10], [11]]
  programs = ("lookup_chunk", "lower_blocks", "upper_blocks", "draw_tokens")
  with compiled() as count:
    generate_all(*tiny.parts, other, max_new_tokens=5, key=KEY)
    assert not count(*programs)
    # It would be noticed.
    generate_all(*tiny.parts, other * 2, max_new_tokens=1, key=KEY)
    assert all(count(name) for name in programs)


def test_pad_prompts():
  ids, lengths = pad_prompts([[1] * 17, [2, 3]], vocab_size=4)
  assert ids.shape == (2, 32) and lengths.tolist() == [17, 2]
  assert ids[1].tolist() == [2, 3] + [0] * 30
  assert ids.dtype == lengths.dtype == jnp.int32


@pytest.mark.parametrize(
  "change, message",
  [
    ({"prompts": []}, "prompts: none"),
    ({"prompts": [[1], []]}, r"prompts\[1\]: empty"),
    ({"prompts": [[1], [2, 24]]}, r"prompts\[1\]: 24; valid: .* < 24"),
    ({"prompts": [[-1]]}, r"prompts\[0\]: -1"),
    ({"max_new_tokens": 0}, "max_new_tokens: 0"),
    ({"temperature": -0.5}, "temperature: -0.5"),
    ({"top_k": 0}, "top_k: 0"),
    ({"top_p": 0.0}, "top_p: 0.0"),
    ({"end_id": 24}, "end_id: 24"),
    ({"end_id": -1}, "end_id: -1"),
    ({"end_id": 0}, "end_id: 0; valid: an id that can be drawn"),
    ({"vocab_size": 29}, "vocab_size: 29; valid: 1 to .*28"),
    ({"vocab_size": 25}, "vocab_size: 25; valid: at most the memory's, 24"),
    ({"pad_id": 24}, "pad_id: 24"),
    ({"slots": 0}, "slots: 0; valid: an integer >= 1, or None"),
    ({"store": None}, "store: None; valid: a store with a memory, and None"),
    ({"memory": None}, "store: TableStore; valid: a store with a memory, an"),
  ],
)
def test_refusals_at_the_call(tiny, change, message):
  names = ("model", "memory", "store")
  arguments = dict(zip(names, tiny.parts))
  arguments |= {"prompts": PROMPTS, "max_new_tokens": 3, "key": KEY}
  with pytest.raises(InputError, match=f"^{message}"):
    generate(**(arguments | change))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_tables_that_are_no_numbers_generate_nothing(tiny, temperature, value):
  broken = {i: jnp.full_like(x, value) for i, x in tiny.tables.items()}
  steps = generate(
    tiny.model,
    tiny.memory,
    TableStore(broken),
    PROMPTS,
    max_new_tokens=STEPS,
    key=KEY,
    temperature=temperature,
  )
  with pytest.raises(
    NonFiniteError, match=r"prompts\[0\] at new token 0 .*: tables\[0\]"
  ):
    next(steps)


@pytest.mark.parametrize(
  "options",
  [
    {"max_new_tokens": 2.5},
    {"slots": 1.5},
    {"end_id": 3.0},
    {"vocab_size": 20.5},
    {"pad_id": 0.0},
    {"max_new_tokens": 2**31},
    {"max_new_tokens": True},
  ],
)
@pytest.mark.usefixtures("types_unchecked")
def test_numbers_that_would_be_rounded_are_refused(tiny, options):
  (name,) = options
  options = {"max_new_tokens": 1, "key": KEY} | options
  with pytest.raises(InputError, match=f"^{name}: "):
    generate(*tiny.parts, PROMPTS, **options)
  with pytest.raises(InputError, match=r"^prompts\[0\]: 2.7"):
    pad_prompts([[2.7]], vocab_size=9)


def test_caches_that_do_not_fit_are_refused_with_their_bytes(tiny):
  count = 2**30 - 100
  with pytest.raises(InputError, match=r"^max_new_tokens: ") as refused:
    generate(*tiny.parts, PROMPTS, max_new_tokens=count, key=KEY)
  needed = decoding_bytes(tiny.model, slots=3, prompt=16, capacity=2**30)
  # More than a terabyte.
  assert f"takes {needed:,} bytes at least" in str(refused.value)
  assert str(refused.value).endswith(" are free")


def test_bytes_are_those_of_the_caches_that_are_made(tiny):
  cache = init_cache(for_decoding(tiny.model), 2, 32)
  made = sum(x.nbytes for x in jax.tree.leaves(cache))
  heads = tiny.model.config.attention.num_heads
  found = decoding_bytes(tiny.model, slots=2, prompt=16, capacity=32)
  assert found == made + 4 * 2 * heads * 16 * 32
