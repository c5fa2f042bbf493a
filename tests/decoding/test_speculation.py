"""Speculative decoding: the text of plain decoding, rows read once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.decoding.drafters import (
  corpus_drafter,
  first_of,
  memory_logits,
  prompt_lookup,
  table_drafter,
)
from engram_jax.decoding.generate import generate_all
from engram_jax.decoding.speculation import rounding_margin, speculate
from engram_jax.errors import InputError, NonFiniteError
from engram_jax.stores.host_stores import HostStore
from engram_jax.stores.open_store import pack_tables
from engram_jax.stores.program_stores import TableStore

KEY = jax.random.key(0)
PROMPT, STEPS, LENGTH = [5, 6, 7, 8, 9], 24, 6
MODEL_IDS = {"vocab_size": 24, "pad_id": 0}


def plain(tiny, **options):
  options = {"max_new_tokens": STEPS, "key": KEY} | MODEL_IDS | options
  return generate_all(*tiny.parts, [PROMPT], **options)[0]


def passes_of(tiny, drafter, *, parts=None, **options):
  options = {"max_new_tokens": STEPS, "draft_length": LENGTH} | options
  options = MODEL_IDS | options
  parts = tiny.parts if parts is None else parts
  return list(speculate(*parts, PROMPT, drafter=drafter, **options))


def text_of(passes):
  return [token for one in passes for token in one.tokens]


def oracle(text, *, right):
  """Drafts the first `right` tokens as the model would, then a wrong one."""

  def draft(tokens, limit, rows):
    del rows
    here = len(tokens) - len(PROMPT)
    found = text[here : here + right]
    wrong = [(token % 23) + 1 for token in text[here + right :]]
    return (found + wrong)[:limit]

  return draft


@pytest.mark.parametrize("right", [0, 1, 2, 3, 4, 5, LENGTH])
def test_the_text_is_plain_greedy_decoding_whatever_is_accepted(
  every_tiny, right
):
  # The convolution reaches 4 tokens back: drafts are shorter and longer.
  text = plain(every_tiny)
  passes = passes_of(every_tiny, oracle(text, right=right))
  assert text_of(passes) == text
  left = STEPS - 1
  for one in passes[1:]:
    drafted = min(LENGTH, left - 1)
    accepted = min(right, drafted)
    assert one[1:] == (drafted, accepted)
    assert len(one.tokens) == accepted + 1
    left -= accepted + 1


def test_nothing_drafted_is_plain_decoding(tiny):
  passes = passes_of(tiny, lambda text, limit, rows: [])
  assert text_of(passes) == plain(tiny)
  assert len(passes) == STEPS
  assert not any(one.drafted for one in passes)


@pytest.mark.parametrize("home", ["device", "host"])
def test_rows_of_a_draft_are_read_once(tiny, home):
  table = TableStore(tiny.tables)
  if home == "host":
    packed, row_format = pack_tables(tiny.tables, tiny.hashing, "float32")
    store = HostStore(packed, row_format)
  else:
    store = table
  drafter = table_drafter(tiny.model, vocab_size=24)
  parts, columns = (tiny.model, tiny.memory, store), 2 * 4
  passes = iter(
    speculate(
      *parts,
      PROMPT,
      drafter=drafter,
      draft_length=LENGTH,
      max_new_tokens=STEPS,
    )
  )
  text, asked = list(next(passes).tokens), store.statistics.rows_asked
  for one in passes:
    text += one.tokens
    # The last token's, and those of the tokens drafted after it.
    now = store.statistics.rows_asked
    assert now - asked == (one.drafted + 1) * columns
    asked = now
  assert text == plain(tiny)


def test_what_a_chunk_leaves_undecided_a_step_decides(every_tiny):
  # No lead is ever large enough: half of all passes decide nothing.
  text = plain(every_tiny)
  drafter = oracle(text, right=LENGTH)
  passes = passes_of(every_tiny, drafter, margin=1e9)
  assert text_of(passes) == text
  assert [len(one.tokens) for one in passes[:5]] == [1, 0, 1, 0, 1]
  assert [one.drafted for one in passes[:5]] == [0, LENGTH, 0, LENGTH, 0]


def test_rows_of_an_undecided_token_and_its_draft_are_kept(tiny):
  store = TableStore(tiny.tables)
  text = plain(tiny)
  passes = speculate(
    tiny.model,
    tiny.memory,
    store,
    PROMPT,
    drafter=oracle(text, right=LENGTH),
    draft_length=LENGTH,
    max_new_tokens=STEPS,
    margin=1e9,
  )
  next(passes)
  read, positions = store.statistics.rows_asked, []
  for _ in passes:
    now = store.statistics.rows_asked
    positions.append((now - read) / (2 * 4))
    read = now
  # After the first draft each adds the one token that its last did not hold.
  assert positions[:6] == [LENGTH + 1, 0, 1, 0, 1, 0]


def test_equal_logits_are_undecided_and_take_the_smallest_id(tiny_plain):
  # A head of zeros: all logits are equal.
  graph, weights = nnx.split(tiny_plain.model)
  model = nnx.merge(graph, jax.tree.map(jnp.zeros_like, weights))
  tied = dataclasses.replace(tiny_plain, model=model)
  text = plain(tied, max_new_tokens=4)
  assert text == [1] * 4
  for margin in (0.0, None):
    passes = passes_of(
      tied, oracle([1] * 4, right=4), max_new_tokens=4, margin=margin
    )
    assert text_of(passes) == text
    assert not any(one.accepted for one in passes)


def test_it_ends_with_the_end_token_also_inside_a_draft(tiny):
  text = plain(tiny)
  end_id = text[4]
  expected = text[: text.index(end_id) + 1]
  passes = passes_of(tiny, oracle(text, right=LENGTH), end_id=end_id)
  assert text_of(passes) == expected
  for count in (1, 2, 3, LENGTH + 1):
    passes = passes_of(tiny, oracle(text, right=LENGTH), max_new_tokens=count)
    assert text_of(passes) == text[:count]


def test_memory_off(tiny):
  parts = (tiny.model, None, None)
  text = generate_all(
    *parts, [PROMPT], max_new_tokens=STEPS, key=KEY, **MODEL_IDS
  )[0]
  passes = passes_of(tiny, oracle(text, right=3), parts=parts)
  assert text_of(passes) == text != plain(tiny)
  with pytest.raises(InputError, match="rows: None"):
    passes_of(tiny, table_drafter(tiny.model), parts=parts)


def test_drafts_of_any_length_compile_nothing_again(tiny, compiled):
  passes_of(tiny, oracle(plain(tiny), right=2))
  with compiled() as count:
    passes_of(tiny, lambda text, limit, rows: [3] * min(limit, len(text) % 5))
    assert not count("_verify", "lower_blocks", "upper_blocks")
    passes_of(tiny, oracle(plain(tiny), right=2), draft_length=2)
    assert count("_verify")  # it would be noticed


def test_prompt_lookup():
  text = [1, 2, 3, 9, 2, 3, 7, 1, 2, 3]
  # The trigram stood at the start, the bigram once more after it.
  assert prompt_lookup(text, 2) == [9, 2]
  assert prompt_lookup(text, 9, longest=2) == [7, 1, 2, 3]
  assert prompt_lookup(text, 0) == []
  assert prompt_lookup([1, 2, 3], 4) == []
  assert prompt_lookup([5], 4) == []
  assert prompt_lookup([1, 2, 4, 2], 4, shortest=2) == []
  # It may overlap with itself.
  assert prompt_lookup([8, 8, 8], 4) == [8]
  with pytest.raises(InputError, match="longest: 1"):
    prompt_lookup(text, 4, longest=1, shortest=2)


def test_corpus_drafter_takes_what_mostly_followed():
  texts = np.array([[1, 2, 3, 1, 2, 4], [1, 2, 4, 5, 3, 9]], np.int32)
  draft = corpus_drafter(texts, longest=2)
  # After (1, 2): 3, 4, 4. Then (2, 4): 5, (4, 5): 3, (5, 3): 9; 9 ends a row.
  assert draft([7, 1, 2], 9, None) == [4, 5, 3, 9]
  assert draft([7, 1, 2], 2, None) == [4, 5]
  # (7, 3) was never met; after 3: 1 and 9, once each. No row goes on.
  assert draft([7, 3], 1, None) == [1]
  assert draft([7], 1, None) == draft([4, 1, 9], 1, None) == []
  with pytest.raises(InputError, match="longest: 6"):
    corpus_drafter(texts, longest=6)


def test_memory_logits_are_those_of_the_values_alone(tiny, make_tiny_with):
  rng = np.random.default_rng(0)
  rows = {i: rng.normal(size=(2, 3, 4, 4)).astype(np.float32) for i in (0, 2)}
  rows = jax.tree.map(jnp.asarray, rows)
  logits = np.asarray(memory_logits(tiny.model, rows))
  value = 0
  for layer, engram in zip((0, 2), tiny.model.engrams):
    params = engram.params()
    entry = np.asarray(rows[layer]).reshape(2, 3, 16)
    value = value + entry @ np.asarray(params.projection)[:, -1]
    if params.projection_bias is not None:
      value = value + np.asarray(params.projection_bias)[-1]
  rms = np.sqrt((value**2).mean(-1, keepdims=True) + 1e-20)
  scale = np.asarray(tiny.model.norm.scale[...])
  matrix = np.asarray(tiny.model.output_matrix())
  np.testing.assert_allclose(
    logits, value / rms * scale @ matrix.T, rtol=1e-3, atol=1e-4
  )
  # A lens in its place, of one layer alone.
  lens = {0: rng.normal(size=(16, 32)).astype(np.float32)}
  hidden = np.asarray(rows[0]).reshape(2, 3, 16) @ lens[0]
  rms = np.sqrt((hidden**2).mean(-1, keepdims=True) + 1e-20)
  np.testing.assert_allclose(
    np.asarray(memory_logits(tiny.model, rows, lens)),
    hidden / rms * scale @ matrix.T,
    rtol=1e-3,
    atol=1e-4,
  )
  with pytest.raises(InputError, match=r"lens: layers \[1\]"):
    memory_logits(tiny.model, rows, {1: lens[0]})
  other = make_tiny_with(
    "conv", fusion="input_average", layers=(0,), short_conv=False
  )
  with pytest.raises(InputError, match=r"^engram\.fusion: input_average"):
    memory_logits(other.model, {0: rows[0]})


def test_the_table_drafts_its_own_choices_one_after_another(tiny):
  seen = []
  inner = table_drafter(tiny.model, vocab_size=24)

  def draft(text, limit, rows):
    found = inner(text, limit, rows)
    seen.append((list(text), list(found)))
    return found

  passes_of(tiny, draft)
  text, found = seen[1]
  joined = np.array([text + found], np.int32)
  row_ids = tiny.memory.row_ids_numpy(joined)
  rows = {i: tiny.tables[i][ids] for i, ids in row_ids.items()}
  best = np.asarray(memory_logits(tiny.model, rows))[0, :, :24].argmax(-1)
  assert found == best[len(text) - 1 : -1].tolist() != []


def test_first_of_asks_in_turn(tiny):
  drafter = first_of(
    lambda text, limit, rows: [],
    lambda text, limit, rows: [7],
    lambda text, limit, rows: [8],
  )
  assert list(drafter([1], 3, None)) == [7]
  assert list(first_of()([1], 3, None)) == []
  both = first_of(prompt_lookup, table_drafter(tiny.model, vocab_size=24))
  assert text_of(passes_of(tiny, both)) == plain(tiny)


def test_refusals(tiny, tiny_plain):
  def refused(match, **options):
    with pytest.raises(InputError, match=match):
      options = {"drafter": prompt_lookup, "draft_length": 2} | options
      options = {"prompt": PROMPT, "max_new_tokens": 4} | options
      speculate(*tiny.parts, **options)

  refused("draft_length: 0", draft_length=0)
  refused("max_new_tokens: 0", max_new_tokens=0)
  refused("margin: -1.0", margin=-1.0)
  refused("prompts.0.: empty", prompt=[])
  refused("end_id: 0", end_id=0)
  for wrong, match in (
    ([1] * 9, "length of the draft: 9"),
    ([25], "draft: 25"),
  ):
    with pytest.raises(InputError, match=match):
      passes_of(tiny, lambda text, limit, rows, wrong=wrong: wrong)
  with pytest.raises(InputError, match=r"model\.config\.engram"):
    table_drafter(tiny_plain.model)
  assert rounding_margin("float32") < rounding_margin("bfloat16") < 0.1


def test_numbers_that_are_none_are_told_not_drafted(tiny):
  tables = {i: table.at[:].set(jnp.nan) for i, table in tiny.tables.items()}
  parts = (tiny.model, tiny.memory, TableStore(tables))
  with pytest.raises(NonFiniteError, match=r"new token 0 .* tables"):
    passes_of(tiny, prompt_lookup, parts=parts)
