"""Tests of facts: frequencies, what is held out, and that guessing fails."""

import collections
import dataclasses
import itertools
import re

import pytest

from engram_jax.data.synthetic import facts
from engram_jax.data.synthetic.facts import FactsConfig
from engram_jax.data.synthetic.facts_oracle import oracle
from engram_jax.errors import InputError

CONFIG = FactsConfig(
  entities=48, attributes=3, relations=2, values=8, frequencies=(1, 3, 8)
)


def texts(split, config=CONFIG):
  return [x.text for x in facts.documents(config) if x.split == split]


def sentences(split):
  joined = "".join(texts(split)).replace("\n", " ")
  return [f"{x}." for x in joined.split(". ") if x.strip()]


def score(answer, questions):
  questions = list(questions)
  assert questions
  right = sum(answer(x.prompt) == x.answer for x in questions)
  return right / len(questions)


@pytest.mark.parametrize("held_out", [True, False])
def test_an_oracle_answers_everything_from_the_train_split(held_out):
  answer = oracle(texts("train"))
  assert score(answer, facts.questions(CONFIG, held_out=held_out)) == 1
  assert score(answer, facts.two_hop_questions(CONFIG, held_out=held_out)) == 1


def test_the_oracle_needs_the_text():
  answer = oracle(texts("train", dataclasses.replace(CONFIG, seed=1)))
  assert score(answer, facts.questions(CONFIG)) == 0
  # One half of the statements does not tell the facts stated once.
  half = oracle(texts("train")[::2])
  assert 0 < score(half, facts.questions(CONFIG)) < 1


def test_each_fact_is_stated_as_often_as_it_says_and_in_turns():
  found = collections.Counter(sentences("train"))
  total = 0
  for fact in (*facts.make_facts(CONFIG), *facts.make_two_hop_facts(CONFIG)):
    counts = [found[facts.state(fact, x)] for x in facts.TEMPLATES]
    assert sum(counts) == fact.frequency
    assert max(counts) - min(counts) <= 1
    total += fact.frequency
  assert total == found.total()


def test_every_frequency_has_as_many_entities():
  by_entity = {x.entity: x.frequency for x in facts.make_facts(CONFIG)}
  counts = collections.Counter(by_entity.values())
  assert counts == dict.fromkeys(CONFIG.frequencies, 16)


def test_held_out_wordings_and_triples_are_not_in_the_train_split():
  train = " ".join(texts("train"))
  for question in itertools.chain(
    facts.questions(CONFIG), facts.two_hop_questions(CONFIG)
  ):
    assert question.prompt not in train
  known = list(facts.two_hop_questions(CONFIG, held_out=False))
  subjects = {x.subject for x in facts.make_two_hop_facts(CONFIG)}
  for question in known:
    assert any(f"{subject} " in question.prompt for subject in subjects)
  validation = sentences("validation")
  assert len(validation) == len(facts.make_facts(CONFIG))
  assert not {*validation} & {*sentences("train")}


def test_about_as_many_triples_are_stated_as_were_asked_for():
  triples = facts.make_two_hop_facts(CONFIG)
  stated = [x for x in triples if x.frequency]
  assert len(triples) == 48 * 2 * 3
  assert 0.4 < len(stated) / len(triples) < 0.6


def test_relations_have_no_fixed_point_and_reach_everybody():
  relations = [x for x in facts.make_facts(CONFIG) if x.attribute == "mentor"]
  assert {x.value for x in relations} == {x.entity for x in relations}
  assert all(x.value != x.entity for x in relations)


def test_the_question_alone_does_not_tell_the_answer():
  """Neither the attribute, nor either word of the name, nor the mentor does."""
  config = dataclasses.replace(CONFIG, entities=400)
  all_facts = facts.make_facts(config)
  mentors = {x.entity: x.value for x in all_facts if x.attribute == "mentor"}
  values = {(x.entity, x.attribute): x.value for x in all_facts}
  for attribute in ("home", "metal"):
    column = [values[name, attribute] for name in mentors]
    (_, most), *_ = collections.Counter(column).most_common()
    chance = next(x for x in all_facts if x.attribute == attribute).chance
    assert most / 400 == chance == 1 / config.values
  pairs = {
    "given": lambda a, b: a.split()[0] == b.split()[0],
    "family": lambda a, b: a.split()[1] == b.split()[1],
    "mentor": lambda a, b: mentors[a] == b,
  }
  for together in pairs.values():
    same = [
      values[a, "home"] == values[b, "home"]
      for a, b in itertools.permutations(mentors, 2)
      if together(a, b)
    ]
    expected = 1 / config.values
    spread = (expected * (1 - expected) / len(same)) ** 0.5
    assert abs(sum(same) / len(same) - expected) < 5 * spread


def test_only_both_words_of_a_name_say_who_is_meant():
  names = [x.entity for x in facts.make_facts(CONFIG) if x.attribute == "home"]
  assert len({*names}) == len(names)
  for part in (0, 1):
    shared = collections.Counter(name.split()[part] for name in names)
    assert sum(shared.values()) / len(shared) > 3


def test_the_same_seed_gives_the_same_text_and_another_one_others():
  assert texts("train") == texts("train")
  assert texts("train") != texts("train", dataclasses.replace(CONFIG, seed=1))


def test_an_edited_fact_is_asked_and_stated_with_its_new_value():
  fact = facts.make_facts(CONFIG)[0]
  others = [x for x in facts.values_of(CONFIG)["home"] if x != fact.value]
  new = dataclasses.replace(fact, value=others[0])
  question = facts.ask(new, facts.HELD_OUT_TEMPLATES[0], edited=True)
  assert question.answer == f" {others[0]}" and question.labels["edited"]
  answer = oracle([facts.state(new, facts.TEMPLATES[1])])
  assert answer(question.prompt) == question.answer


def test_words_are_no_words_of_the_templates():
  known = " ".join(facts.TEMPLATES + facts.HELD_OUT_TEMPLATES)
  known = {*re.findall(r"\w+", known), *facts.ATTRIBUTES}
  invented = " ".join(x.entity.lower() for x in facts.make_facts(CONFIG))
  assert not known & {*invented.split()}


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("entities", 1),
    ("attributes", 8),
    ("relations", 4),
    ("values", 1),
    ("frequencies", ()),
    ("frequencies", (-1,)),
    ("two_hop_share", 1.5),
    ("sentences", 0),
    ("seed", -1),
  ],
)
def test_bad_fields_are_refused_by_name(field, value):
  with pytest.raises(InputError, match=field):
    FactsConfig(**{field: value})


def test_more_words_than_there_are_is_refused():
  config = FactsConfig(values=20_000, attributes=1)
  with pytest.raises(InputError, match="words"):
    facts.make_facts(config)
