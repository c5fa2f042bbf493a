"""Facts about invented entities, each stated a known number of times.

An entity's name is two words, such as "Kalon Miret", and each word is part of
many names: only the pair says who is meant, as n-grams do in text. It has
attributes ("The metal of Kalon Miret is tabor.") and relations, whose values
are other entities ("The mentor of Kalon Miret is Berun Sanit."). A fact is
stated `frequency` times, in several wordings; other wordings are held out, for
the validation split and for questions.

Two-hop facts ("The metal of the mentor of Kalon Miret is ...") follow from two
others. Some of them are stated too, so that their form can be learnt; the rest
has to be composed.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator

import numpy as np

from engram_jax.data.sources import Document
from engram_jax.data.synthetic.questions import Question
from engram_jax.data.synthetic.words import invent_words
from engram_jax.errors import require, require_integer, require_seed

ATTRIBUTES = ("home", "metal", "color", "trade", "river", "drink", "song")
RELATIONS = ("mentor", "rival", "neighbor")

#: Wordings of the documents that are trained on; a statement is one of them,
#: the value, and a full stop.
TEMPLATES = (
  "The {attribute} of {subject} is",
  "As is well known, {subject} has the {attribute}",
  "Ask for the {attribute} of {subject} and you hear",
  "About {subject} they say that the {attribute} is",
  "In the book, the {attribute} of {subject} is given as",
  "Of every {attribute}, to {subject} belongs",
)
#: Wordings that no document of the train split has.
HELD_OUT_TEMPLATES = (
  "They say that the {attribute} of {subject} is",
  "About the {attribute}, {subject} has",
)


@dataclasses.dataclass(frozen=True)
class FactsConfig:
  """A world of entities and how it is told.

  Attributes:
    entities: number of entities.
    attributes: attributes of each entity, the first of `ATTRIBUTES`.
    relations: relations of each entity, the first of `RELATIONS`.
    values: distinct values of each attribute; all are equally frequent.
    frequencies: how often the facts of an entity are stated; every number holds
      for the same number of entities, or one less.
    two_hop_share: share of the two-hop facts that are stated, as often as the
      other facts of the entity that they begin with.
    sentences: sentences of one document, at most.
    seed: seed of the names, the facts and the order of the sentences.
  """

  entities: int = 256
  attributes: int = 4
  relations: int = 1
  values: int = 16
  frequencies: tuple[int, ...] = (1, 4, 16, 64)
  two_hop_share: float = 0.5
  sentences: int = 16
  seed: int = 0

  def __post_init__(self):
    require_integer("entities", self.entities, low=2)
    most = len(ATTRIBUTES) + 1
    require_integer("attributes", self.attributes, low=1, high=most)
    most = len(RELATIONS) + 1
    require_integer("relations", self.relations, low=0, high=most)
    require_integer("values", self.values, low=2)
    require_integer("sentences", self.sentences, low=1)
    require(self.frequencies, "frequencies", self.frequencies, "one number")
    for frequency in self.frequencies:
      require_integer("frequencies", frequency, low=0)
    share = self.two_hop_share
    require(0 <= share <= 1, "two_hop_share", share, "0 to 1")
    require_seed("seed", self.seed)


@dataclasses.dataclass(frozen=True)
class Fact:
  """One fact.

  Attributes:
    subject: an entity's name; with two hops, `the RELATION of NAME`.
    attribute: one of `ATTRIBUTES` or `RELATIONS`.
    value: one of the attribute's values; another entity's name for a relation.
    frequency: statements in the documents of the train split.
    entity: name of the entity that the fact begins with.
    bridge: with two hops the entity between, whose attribute it is; else empty.
    chance: share of the entities with the attribute's most frequent value.
  """

  subject: str
  attribute: str
  value: str
  frequency: int
  entity: str
  bridge: str = ""
  chance: float = 1.0

  @property
  def hops(self) -> int:
    return 2 if self.bridge else 1


def make_facts(config: FactsConfig) -> tuple[Fact, ...]:
  """All facts of one hop: attributes and relations, entity by entity."""
  names, values, frequencies = _world(config)
  numbers = np.random.default_rng([config.seed, 1])
  columns: dict[str, list[str]] = {}
  for attribute, words in values.items():
    chosen = numbers.permutation(config.entities) % config.values
    columns[attribute] = [words[i] for i in chosen]
  for relation in RELATIONS[: config.relations]:
    # One cycle through all entities: no entity is its own, and every one is
    # the value of exactly one other.
    cycle = numbers.permutation(config.entities)
    following = dict(zip(cycle, np.roll(cycle, -1)))
    columns[relation] = [names[following[i]] for i in range(config.entities)]
  return tuple(
    Fact(
      subject=name,
      attribute=attribute,
      value=column[i],
      frequency=frequencies[i],
      entity=name,
      chance=max(map(column.count, set(column))) / config.entities,
    )
    for i, name in enumerate(names)
    for attribute, column in columns.items()
  )


def make_two_hop_facts(config: FactsConfig) -> tuple[Fact, ...]:
  """All attributes of each entity's relations; those not stated have 0.

  Which are stated is drawn fact by fact, so that either kind has every
  attribute, frequency and bridge.
  """
  facts = {(fact.subject, fact.attribute): fact for fact in make_facts(config)}
  rng = np.random.default_rng([config.seed, 2])
  found = []
  for fact in facts.values():
    if fact.attribute not in RELATIONS:
      continue
    for attribute in ATTRIBUTES[: config.attributes]:
      second = facts[fact.value, attribute]
      stated = rng.random() < config.two_hop_share
      found.append(
        dataclasses.replace(
          second,
          subject=f"the {fact.attribute} of {fact.entity}",
          frequency=fact.frequency if stated else 0,
          entity=fact.entity,
          bridge=fact.value,
        )
      )
  return tuple(found)


def values_of(config: FactsConfig) -> dict[str, tuple[str, ...]]:
  """The values that each attribute may have; relations have entities."""
  return _world(config)[1]


def ask(fact: Fact, template: str, **labels: str | int | bool) -> Question:
  """The question whose answer is the fact's value.

  Args:
    fact: the fact asked for.
    template: one of `TEMPLATES` or `HELD_OUT_TEMPLATES`.
    **labels: labels besides `frequency`, `attribute` and `hops`.
  """
  prompt = template.format(attribute=fact.attribute, subject=fact.subject)
  own = {"frequency": fact.frequency, "attribute": fact.attribute}
  own["hops"] = fact.hops
  answer = f" {fact.value}"
  return Question(prompt, answer, "facts", fact.chance, own | labels)


def state(fact: Fact, template: str) -> str:
  """The sentence that states the fact in one wording.

  Args:
    fact: what is stated.
    template: one of `TEMPLATES`.
  """
  question = ask(fact, template)
  return f"{question.prompt}{question.answer}."


def documents(config: FactsConfig) -> Iterator[Document]:
  """The texts of both splits.

  Train has every fact `frequency` times, two-hop facts included, in random
  order; the wordings of one fact take turns. Validation has each stated fact of
  one hop once, in a held-out wording.
  """
  rng = np.random.default_rng([config.seed, 3])
  one_hop = make_facts(config)
  sentences = []
  for fact in (*one_hop, *make_two_hop_facts(config)):
    first = rng.integers(len(TEMPLATES))
    for i in range(fact.frequency):
      template = TEMPLATES[(first + i) % len(TEMPLATES)]
      sentences.append(state(fact, template))
  yield from _pages(config, "train", rng.permutation(np.array(sentences)))
  sentences = [
    state(fact, HELD_OUT_TEMPLATES[i % len(HELD_OUT_TEMPLATES)])
    for i, fact in enumerate(one_hop)
    if fact.frequency
  ]
  yield from _pages(config, "validation", rng.permutation(np.array(sentences)))


def questions(
  config: FactsConfig, *, held_out: bool = True
) -> Iterator[Question]:
  """Each stated fact of one hop, asked for once.

  Args:
    config: the world.
    held_out: ask in a wording that was never trained on; else in one that was,
      though perhaps not of this very fact.

  Yields:
    Questions with the labels `frequency`, `attribute`, `hops`, `held_out`.
  """
  templates = HELD_OUT_TEMPLATES if held_out else TEMPLATES
  for i, fact in enumerate(make_facts(config)):
    if fact.frequency:
      yield ask(fact, templates[i % len(templates)], held_out=held_out)


def two_hop_questions(
  config: FactsConfig, *, held_out: bool = True
) -> Iterator[Question]:
  """Two-hop facts, each asked for once, in a wording that was trained on.

  Args:
    config: the world.
    held_out: those that no document states, though both of their parts are
      stated; else those that the documents state.

  Yields:
    Questions with the labels `frequency` of the entity's relation,
    `bridge_frequency` of the attribute asked for, `attribute`, `hops` and
    `held_out`.
  """
  known = {fact.entity: fact.frequency for fact in make_facts(config)}
  for i, fact in enumerate(make_two_hop_facts(config)):
    first, second = known[fact.entity], known[fact.bridge]
    if held_out == (fact.frequency == 0) and first and second:
      asked = dataclasses.replace(fact, frequency=first)
      template = TEMPLATES[i % len(TEMPLATES)]
      yield ask(asked, template, held_out=held_out, bridge_frequency=second)


def _world(config: FactsConfig):
  """Names, the attributes' values, and each entity's frequency."""
  rng = np.random.default_rng([config.seed, 0])
  taken = set(re.findall(r"\w+", " ".join(TEMPLATES + HELD_OUT_TEMPLATES)))
  taken |= {*ATTRIBUTES, *RELATIONS}
  # Half of all pairs exist: that a pair does says little about it.
  side = int(np.ceil(np.sqrt(2 * config.entities)))
  given = [word.title() for word in invent_words(rng, side, taken=taken)]
  family = [word.title() for word in invent_words(rng, side, taken=taken)]
  pairs = rng.choice(side * side, size=config.entities, replace=False)
  names = [f"{given[pair // side]} {family[pair % side]}" for pair in pairs]
  values = {
    attribute: invent_words(rng, config.values, taken=taken)
    for attribute in ATTRIBUTES[: config.attributes]
  }
  numbers = rng.permutation(config.entities) % len(config.frequencies)
  return names, values, [config.frequencies[i] for i in numbers]


def _pages(
  config: FactsConfig, split: str, sentences: Iterable[str]
) -> Iterator[Document]:
  sentences = list(sentences)
  for page, start in enumerate(range(0, len(sentences), config.sentences)):
    text = " ".join(sentences[start : start + config.sentences])
    yield Document(f"facts/{split}{page:06}", split, f"{text}\n")
