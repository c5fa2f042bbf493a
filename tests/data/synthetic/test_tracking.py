"""Tests of variable tracking: the oracle, chains, and that guessing fails."""

import collections
import re

import pytest

from engram_jax.data.synthetic import tracking
from engram_jax.data.synthetic.tracking import TrackingConfig
from engram_jax.errors import InputError

CONFIG = TrackingConfig(chains=3, hops=4, variables=20, values=10, fillers=30)
COPY = r"copy (\w+) > (\w+) \."


def ask(config=CONFIG, *, words=60, depth=None, count=40):
  return list(tracking.questions(config, words=words, depth=depth, count=count))


@pytest.mark.parametrize("words", [0, 7, 200])
def test_an_oracle_answers_everything_from_the_prompt(words):
  for depth in (None, 0.0, 0.3, 1.0):
    for question in ask(words=words, depth=depth):
      assert tracking.oracle(question.prompt) == question.answer


@pytest.mark.parametrize("asked", [1, 3])
def test_documents_end_in_questions_and_their_answers(asked):
  for document in tracking.documents(
    CONFIG, words=(3, 30), count=30, asked=asked
  ):
    text, *ends = document.text.split("\ntrace ")
    assert len({x.split()[0] for x in ends}) == len(ends) == asked
    for end in ends:
      value, answer = re.fullmatch(r"(\w+)( >.*) \.\n?", end).groups()
      assert tracking.oracle(f"{text}\ntrace {value}") == answer


def test_chains_are_disjoint_and_in_the_order_of_the_text():
  for question in ask():
    pairs = re.findall(COPY, question.prompt)
    sources, targets = zip(*pairs)
    assert len(pairs) == len({*sources}) == len({*targets}) == 12
    assert len({*sources} - {*targets}) == 3
    names = question.answer.split()[1::2]
    places = [targets.index(name) for name in names]
    assert places == sorted(places) and len(places) == 4


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_chain_begins_where_it_was_asked_for(depth):
  for question in ask(depth=depth):
    haystack, value = question.prompt.split("\ntrace ")
    before = haystack[: haystack.index(f"copy {value} > ")]
    assert len(re.sub(COPY, "", before).split()) == round(depth * 60)


def test_the_question_alone_does_not_tell_the_answer():
  config = TrackingConfig(chains=1, hops=1, variables=8, values=4, fillers=5)
  asked = ask(config, words=5, count=2000)
  counts = collections.defaultdict(collections.Counter)
  for question in asked:
    counts[question.prompt.split()[-1]][question.answer] += 1
  best = sum(max(x.values()) for x in counts.values()) / len(asked)
  assert asked[0].chance == 1 / 8 and 1 / 8 < best < 1 / 8 + 0.06
  assert ask()[0].chance == pytest.approx(1 / (20 * 19 * 18 * 17))


def test_splits_and_questions_share_no_text():
  texts = [
    [
      x.text
      for x in tracking.documents(CONFIG, words=(9, 9), count=50, split=split)
    ]
    for split in ("train", "validation")
  ]
  texts.append([f"{x.prompt}{x.answer} .\n" for x in ask(words=9)])
  flat = [text for part in texts for text in part]
  assert len({*flat}) == len(flat)
  again = tracking.documents(CONFIG, words=(9, 9), count=50)
  assert [x.text for x in again] == texts[0]


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("chains", 0),
    ("hops", 0),
    ("variables", 3),
    ("values", 1),
    ("fillers", 0),
    ("seed", 2**32),
  ],
)
def test_bad_fields_are_refused_by_name(field, value):
  with pytest.raises(InputError, match=field):
    TrackingConfig(**{field: value})
