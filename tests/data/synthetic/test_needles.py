"""Tests of needles: the oracle, places and lengths, and that guessing fails."""

import collections
import dataclasses
import re

import pytest

from engram_jax.data.synthetic import needles
from engram_jax.data.synthetic.needles import KINDS, NeedlesConfig
from engram_jax.errors import InputError


def config(kind, **options):
  return NeedlesConfig(kind=kind, keys=16, values=16, fillers=32, **options)


def ask(task, *, words=50, depth=None, count=40):
  return list(needles.questions(task, words=words, depth=depth, count=count))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("words", [0, 7, 200])
def test_an_oracle_answers_everything_from_the_prompt(kind, words):
  for depth in (None, 0.0, 0.3, 1.0):
    for question in ask(config(kind), words=words, depth=depth):
      assert needles.oracle(question.prompt) == question.answer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("asked", [1, 4])
def test_documents_end_in_questions_and_their_answers(kind, asked):
  task = config(kind)
  found = needles.documents(task, words=(3, 30), count=30, asked=asked)
  for document in found:
    text, *ends = document.text.split("\nrecall ")
    assert len({x.split()[0] for x in ends}) == len(ends)
    assert len(ends) == (1 if kind in ("single", "multi_value") else asked)
    for end in ends:
      query, answer = re.fullmatch(r"(.* :)( .*) \.\n?", end).groups()
      assert needles.oracle(f"{text}\nrecall {query}") == answer


@pytest.mark.parametrize(
  ("kind", "stated", "answered"),
  [
    ("single", 1, 1),
    ("multi_key", 4, 1),
    ("multi_value", 4, 4),
    ("multi_query", 4, 4),
  ],
)
def test_each_kind_has_its_needles(kind, stated, answered):
  for question in ask(config(kind)):
    found = re.findall(r"note (\w+) : (\w+) \.", question.prompt)
    keys, values = zip(*found)
    assert len(found) == len({*values}) == stated
    assert len({*keys}) == (1 if kind == "multi_value" else stated)
    assert len(question.answer.split()) == answered


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_the_needle_lies_where_it_was_asked_for(kind, depth):
  words = 80
  for question in ask(config(kind), words=words, depth=depth):
    haystack, query = question.prompt.split("\nrecall ")
    key, value = query.split()[0], question.answer.split()[0]
    if kind == "multi_query":
      value = question.answer.split()[1]
    before = haystack[: haystack.index(f"note {key} : {value} .")]
    before = re.sub(r"note \w+ : \w+ \.", "", before).split()
    assert len(before) == round(depth * words)
    bare = re.sub(r"note \w+ : \w+ \.", "", haystack).split()
    assert len(bare) == words


def test_the_same_texts_at_every_depth():
  def bare(depth):
    texts = [x.prompt for x in ask(config("multi_value"), depth=depth)]
    return [re.sub(r"note \w+ : \w+ \. ?", "", text).strip() for text in texts]

  first = [x.answer for x in ask(config("multi_value"), depth=0.0)]
  assert first == [x.answer for x in ask(config("multi_value"), depth=0.5)]
  assert [x.split() for x in bare(0.0)] == [x.split() for x in bare(0.5)]


def test_the_question_alone_does_not_tell_the_answer():
  """The best value for each key is right about as often as any."""
  task = dataclasses.replace(config("multi_key"), keys=4, values=8)
  asked = ask(task, words=5, count=2000)
  counts = collections.defaultdict(collections.Counter)
  for question in asked:
    counts[question.prompt.split()[-2]][question.answer] += 1
  best = sum(max(x.values()) for x in counts.values()) / len(asked)
  assert asked[0].chance == 1 / 8
  assert 1 / 8 < best < 1 / 8 + 0.06


def test_chance_counts_every_value_asked_for():
  assert ask(config("single"))[0].chance == 1 / 16
  assert ask(config("multi_query"))[0].chance == 1 / (16 * 15)
  assert ask(config("multi_value"))[0].chance == 1 / (16 * 15 * 14 * 13)


def test_splits_and_questions_share_no_text():
  task = config("single")
  texts = [
    [x.text for x in needles.documents(task, words=(20, 20), count=50, split=s)]
    for s in ("train", "validation")
  ]
  texts.append([f"{x.prompt}{x.answer} .\n" for x in ask(task, words=20)])
  flat = [text for part in texts for text in part]
  assert len({*flat}) == len(flat)
  again = needles.documents(task, words=(20, 20), count=20, first=10)
  assert [x.text for x in again] == texts[0][10:30]


def test_kinds_share_their_words():
  def words(kind):
    texts = needles.documents(config(kind), words=(50, 50), count=50)
    return {*" ".join(x.text for x in texts).split()}

  assert words("multi_key") == words("multi_query")


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("kind", "two"),
    ("needles", 0),
    ("asked", 5),
    ("keys", 3),
    ("values", 3),
    ("fillers", 0),
    ("seed", -1),
  ],
)
def test_bad_fields_are_refused_by_name(field, value):
  with pytest.raises(InputError, match=field):
    NeedlesConfig(**{field: value})


def test_bad_arguments_are_refused_by_name():
  task = config("single")
  with pytest.raises(InputError, match="depth"):
    ask(task, depth=1.5)
  with pytest.raises(InputError, match="words"):
    ask(task, words=-1)
  with pytest.raises(InputError, match="words"):
    list(needles.documents(task, words=(3, 2), count=1))
  with pytest.raises(InputError, match="split"):
    list(needles.documents(task, words=(2, 3), count=1, split="test"))
