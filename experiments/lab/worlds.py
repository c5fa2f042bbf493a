"""The invented worlds of the studies of knowledge, and what is asked of them.

Every world has entities that no text states anything of (frequency 0): their
names occur as others' mentors, so that new facts can be taught about them.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from engram_jax.analysis.answers import score_answers
from engram_jax.config_dicts import to_dict
from engram_jax.data.prepared import prepare
from engram_jax.data.synthetic.facts import (
  RELATIONS,
  Fact,
  FactsConfig,
  documents,
  make_facts,
)
from engram_jax.data.synthetic.folder import write_folder
from engram_jax.data.synthetic.questions import Question, question_batch
from experiments.lab.corpora import Corpus
from experiments.lab.runs import Laboratory, Trained

WORLDS = {
  "smoke": FactsConfig(
    entities=15, attributes=2, values=4, frequencies=(0, 2, 8)
  ),
  "cpu": FactsConfig(entities=150, frequencies=(0, 4, 16, 64, 256)),
  "gpu": FactsConfig(
    entities=3000, values=32, frequencies=(0, 1, 4, 16, 64, 256, 1024)
  ),
}
#: Questions that are asked at a time, and the tokens that they are filled up to
#: a multiple of: nearly all batches are of one shape, and compiled once.
BATCH, LENGTH = 64, 32


class Asked(NamedTuple):
  """Questions with how they were answered.

  Attributes:
    questions: what was asked.
    is_right: bool [n].
    bits: float [n], log2 of the answer's probability over chance: what the
      model knows of it beyond the form of the answers.
  """

  questions: Sequence[Question]
  is_right: np.ndarray
  bits: np.ndarray


def world_of(lab: Laboratory) -> FactsConfig:
  """The world of the laboratory's scale."""
  return WORLDS[lab.scale.name]


def facts_corpus(lab: Laboratory) -> Corpus:
  """The text of the world, written at the first call."""
  world = world_of(lab)
  text = json.dumps(to_dict(world), sort_keys=True)
  name = f"facts-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
  pages = list(documents(world))
  folder = write_folder(
    lab.folder / "corpora" / name / "text", pages, configs=[world]
  )
  size = sum(len(page.text.encode()) for page in pages)
  return Corpus(name, folder, len(pages), size)


def whole_text(lab: Laboratory, corpus: Corpus) -> int:
  """The tokens that a run reads which reads each of a corpus once."""
  tokens = prepare(lab.data_config(corpus)).splits["train"].tokens
  step = lab.scale.batch_size * lab.scale.seq_len
  return (tokens - lab.scale.seq_len - 1) // step * step


def attribute_facts(world: FactsConfig, frequency: int) -> list[Fact]:
  """The facts of a frequency whose values are words, not other entities."""
  return [
    fact
    for fact in make_facts(world)
    if fact.frequency == frequency and fact.attribute not in RELATIONS
  ]


def question_batches(
  tokenizer: tokenizers.Tokenizer, questions: Sequence[Question]
) -> list[dict[str, np.ndarray]]:
  """Batches of one shape; the last one is filled up, and there nothing asked.

  Args:
    tokenizer: the model's.
    questions: one or more.
  """
  longest = max(
    len(tokenizer.encode(q.prompt + q.answer).ids) for q in questions
  )
  seq_len = math.ceil((longest - 1) / LENGTH) * LENGTH
  batches = []
  for start in range(0, len(questions), BATCH):
    part = list(questions[start : start + BATCH])
    filled = part + part[:1] * (BATCH - len(part))
    batch = question_batch(tokenizer, filled, seq_len=seq_len)
    batch["loss_mask"][len(part) :] = False
    batches.append(batch)
  return batches


def ask_all(
  trained: Trained, questions: Sequence[Question], *, model=None, tables=None
) -> Asked:
  """Asks a trained model.

  Args:
    trained: the run.
    questions: one or more.
    model: in place of the run's model.
    tables: in place of its tables; an empty dict turns the memory off.
  """
  model = trained.model if model is None else model
  tables = trained.tables if tables is None else tables
  found = [
    score_answers(model, trained.memory, tables or None, batch)
    for batch in question_batches(trained.data.tokenizer, questions)
  ]
  right, likely = (
    np.concatenate([np.asarray(x[i]) for x in found])[: len(questions)]
    for i in range(2)
  )
  chance = np.log([question.chance for question in questions])
  return Asked(questions, right, (likely - chance) / math.log(2))


def summarize(asked: Asked, *, by: str | None = None) -> dict[str, Any]:
  """Accuracy and known bits, of all questions or by a label.

  Args:
    asked: answers.
    by: the label; the keys of the result are then its values as text.

  Returns:
    `accuracy`, `bits` per question, `known_bits` (the sum over the questions
    that the model knows anything of) and `chance`.
  """
  if by is None:
    chance = float(np.mean([question.chance for question in asked.questions]))
    return {
      "accuracy": float(asked.is_right.mean()),
      "bits": float(asked.bits.mean()),
      "known_bits": float(np.maximum(asked.bits, 0).sum()),
      "chance": chance,
    }
  labels = np.array([question.labels[by] for question in asked.questions])
  parts: Mapping[str, Any] = {
    str(value): summarize(
      Asked(
        [asked.questions[i] for i in np.flatnonzero(labels == value)],
        asked.is_right[labels == value],
        asked.bits[labels == value],
      )
    )
    for value in np.unique(labels)
  }
  return dict(parts)


def in_percent(interval: Mapping[str, Any]) -> dict[str, Any]:
  """An interval of `mean_interval`, of shares, as percentages."""
  names = ("mean", "low", "high")
  return {k: interval[k] and 100 * interval[k] for k in names}
