"""Tests of idioms in noise: that the floor of the loss is what it says."""

import collections
import dataclasses
import itertools
import math

import numpy as np
import pytest

from engram_jax.data.synthetic import idioms
from engram_jax.data.synthetic.idioms import IdiomsConfig
from engram_jax.errors import InputError

CONFIG = IdiomsConfig(
  rate=0.2, idioms=12, openers=3, length=4, noise_words=20, exponent=0.8
)


def texts(config=CONFIG, *, count, split="train"):
  return [x.text for x in idioms.documents(config, count=count, split=split)]


@pytest.mark.parametrize(
  "config",
  [CONFIG, IdiomsConfig(words=400), IdiomsConfig(rate=0.6, exponent=0.0)],
)
def test_the_floor_equals_a_monte_carlo_estimate(config):
  found = texts(config, count=400)
  nats = [idioms.nats(config, x) for x in found]
  error = np.std(nats) / math.sqrt(len(nats))
  expected = idioms.expected_nats(config, words=config.words)
  assert abs(np.mean(nats) - expected) < 4 * error
  assert error < 0.01 * expected


@pytest.mark.parametrize("config", [CONFIG, IdiomsConfig()])
def test_long_texts_have_the_entropy_of_the_formula(config):
  more = [idioms.expected_nats(config, words=n) for n in (1000, 1001)]
  floor = idioms.entropy_per_word(config)
  assert more[1] - more[0] == pytest.approx(floor, rel=1e-6)


def test_the_probabilities_of_all_texts_add_up_to_one():
  config = IdiomsConfig(
    rate=0.3, idioms=4, openers=2, length=3, noise_words=3, words=4
  )
  words = {*" ".join(texts(config, count=200)).split()}
  assert len(words) == 5
  total = 0.0
  for text in itertools.product(words, repeat=4):
    try:
      total += math.exp(-idioms.nats(config, " ".join(text)))
    except InputError:
      continue
  assert total == pytest.approx(1)


def test_no_reader_of_counts_beats_the_floor():
  """Words alone are far above it: the idioms must be known."""
  train, test = texts(count=300), texts(count=300, split="validation")
  counts = collections.Counter(" ".join(train).split())
  words = " ".join(test).split()
  loss = -np.mean([math.log(counts[x] / counts.total()) for x in words])
  assert loss > 1.2 * idioms.entropy_per_word(CONFIG)


def test_idioms_are_as_frequent_as_asked_for():
  words = " ".join(texts(count=400)).split()
  openers = collections.Counter(words)
  firsts = {idiom[0] for idiom in idioms.make_idioms(CONFIG)}
  begun = sum(openers[x] for x in firsts)
  free = len(words) - begun * (CONFIG.length - 1)
  spread = math.sqrt(CONFIG.rate * (1 - CONFIG.rate) / free)
  # The last idiom of a document may be cut.
  assert abs(begun / free - CONFIG.rate) < 4 * spread + 0.005


def test_only_the_pair_of_the_first_words_tells_the_idiom():
  found = idioms.make_idioms(CONFIG)
  assert len({x[:2] for x in found}) == len(found) == 12
  assert len({x[0] for x in found}) == 3
  assert len({x[1] for x in found}) == 4
  words = collections.Counter(" ".join(texts(count=200)).split())
  assert all(words[x] for idiom in found for x in idiom)


def test_an_oracle_continues_every_idiom():
  answer = idioms.oracle(texts(count=100), length=CONFIG.length)
  asked = list(idioms.questions(CONFIG, context=10, count=24))
  assert {x.labels["idiom"] for x in asked} == set(range(12))
  assert all(answer(x.prompt) == x.answer for x in asked)
  assert all(len(x.prompt.split()) >= 12 for x in asked)


def test_the_question_alone_does_not_tell_the_answer():
  answers = [x[2:] for x in idioms.make_idioms(IdiomsConfig())]
  (_, most), *_ = collections.Counter(answers).most_common()
  assert most == 1


def test_splits_share_no_text_and_a_seed_gives_the_same_one():
  train, other = texts(count=50), texts(count=50, split="validation")
  assert len({*train, *other}) == 100
  assert train == texts(count=50)
  changed = dataclasses.replace(CONFIG, seed=1)
  assert not {*train} & {*texts(changed, count=50)}


def test_a_text_of_another_source_is_refused():
  text = texts(count=1)[0]
  changed = dataclasses.replace(CONFIG, seed=1)
  with pytest.raises(InputError, match="text"):
    idioms.nats(changed, text)
  opener, second, *rest = idioms.make_idioms(CONFIG)[0]
  with pytest.raises(InputError, match="an idiom of the source"):
    idioms.nats(CONFIG, " ".join([opener, second, *rest[:-1], opener]))


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("rate", 0.0),
    ("rate", 1.0),
    ("idioms", 9),
    ("openers", 0),
    ("length", 2),
    ("noise_words", 7),
    ("exponent", -1.0),
    ("words", 0),
    ("seed", -1),
  ],
)
def test_bad_fields_are_refused_by_name(field, value):
  with pytest.raises(InputError, match=field):
    IdiomsConfig(**{field: value})
