"""The studies of knowledge: their programs, and what follows from records."""

import copy

import numpy as np
import pytest

from engram_jax.data.synthetic.facts import (
  documents,
  questions,
  two_hop_questions,
)
from engram_jax.data.tokenizers import train_tokenizer
from experiments.lab import edits, knowledge, knowledge_editing, worlds
from experiments.lab.study import open_laboratory

KINDS = ("trained wordings", "two hops, stated", "two hops, composed")


@pytest.mark.parametrize("scale", ["smoke", "cpu"])
def test_a_world_has_every_kind_of_question(scale):
  world = worlds.WORLDS[scale]
  stated = {f for f in world.frequencies if f}
  assert {q.labels["frequency"] for q in questions(world)} == stated
  assert list(two_hop_questions(world, held_out=True))
  assert list(two_hop_questions(world, held_out=False))
  unspoken = worlds.attribute_facts(world, 0)
  assert len(unspoken) >= 2 * world.attributes
  best = worlds.attribute_facts(world, max(world.frequencies))
  assert len({fact.entity for fact in best}) > edits.EDITED[scale]


def test_the_rows_of_a_name_are_read_where_it_ends():
  world = worlds.WORLDS["smoke"]
  texts = [document.text for document in documents(world)]
  tokenizer = train_tokenizer(texts, vocab_size=512)
  facts = worlds.attribute_facts(world, 0)
  taught = edits.lesson(facts, edits.TAUGHT + edits.PARAPHRASES)
  batches = edits.lesson_batches(tokenizer, taught, name_rows=True)
  masked = 0
  for start, batch in zip(range(0, 10**6, worlds.BATCH), batches):
    asked = taught.questions[start : start + worlds.BATCH]
    subjects = taught.subjects[start : start + worlds.BATCH]
    for row, (question, subject) in enumerate(zip(asked, subjects)):
      (position,) = np.flatnonzero(batch["row_mask"][row])
      read = tokenizer.decode(batch["inputs"][row, : position + 1])
      assert read.endswith(subject) and question.prompt.startswith(read)
      masked += 1
    assert not batch["loss_mask"][len(asked) :].any(), "the batch is filled up"
  assert masked == len(facts) * (3 + 3)


def knowledge_record(group: str, seed: int, accuracy: float):
  of_kind = {
    "accuracy": accuracy, "bits": 0.5, "known_bits": 9.0, "chance": 0.2
  }  # fmt: skip
  kind = {"all": of_kind, "by_frequency": {"2": of_kind, "8": of_kind}}
  return {
    "group": group,
    "seed": seed,
    "labels": {"rows": 10},
    "table_parameters": 80,
    "answers": {name: kind for name in KINDS},
  }


@pytest.mark.parametrize(
  ("gain", "noise", "verdict"),
  [
    (0.1, 0.001, "reproduced"),
    (-0.1, 0.001, "contradicted"),
    (0.0, 0.001, "not seen"),
    (0.0, 0.1, "too weak to tell"),
  ],
)
def test_the_verdict_on_knowledge(tmp_path, gain, noise, verdict):
  rng = np.random.default_rng(0)
  records = []
  for seed in range(3):
    for group, more in (("experts", 0), ("memory", gain), ("one row", 0)):
      accuracy = float(0.5 + more + noise * rng.normal())
      records.append(knowledge_record(group, seed, accuracy))
  lab = open_laboratory("cpu", str(tmp_path))
  result = knowledge.analyze(lab, records)
  assert result["verdict"] == verdict, result["finding"]


def edit_record(method: str, rate: float, paraphrase: float, moved: float):
  accuracy = {"efficacy": 1.0, "paraphrase": paraphrase}
  accuracy |= {"same entities": 0.8, "other entities": 0.9 - moved}
  return {
    "method": method,
    "rate": rate,
    "trained_numbers": 100,
    "accuracy": accuracy,
    "divergence": moved,
    "text_loss": 1.0 + moved,
  }


def test_the_best_rate_stands_for_a_method_and_locality_decides(tmp_path):
  records = []
  for seed in range(3):
    noise = 0.001 * seed
    found = [
      edit_record("before", 0.0, 0.1, 0.0),
      edit_record("rows of the names", 0.1, 0.9, 0.01 + noise),
      edit_record("rows of the names", 0.01, 0.2, 0.0),
      edit_record("all rows read", 0.1, 0.9, 0.2),
      edit_record("LoRA", 0.1, 0.9, 0.3 + 2 * noise),
      edit_record("LoRA", 0.3, 0.9, 0.8),
    ]
    swap = {"before": {"facts A": 0.1}, "taught A": {"facts A": 0.9}}
    own = {"group": "memory", "seed": seed, "edits": found, "swap": swap}
    records.append(own)
  lab = open_laboratory("cpu", str(tmp_path))
  result = knowledge_editing.analyze(lab, records)
  methods = result["edits"]["methods"]
  assert methods["rows of the names"]["rate"]["mean"] == pytest.approx(0.1)
  assert methods["LoRA"]["rate"]["mean"] == pytest.approx(0.1)
  assert result["verdict"] == "reproduced"
  swapped = copy.deepcopy(records)
  names = {"LoRA": "rows of the names", "rows of the names": "LoRA"}
  for record in swapped:
    for edit in record["edits"]:
      edit["method"] = names.get(edit["method"], edit["method"])
  assert knowledge_editing.analyze(lab, swapped)["verdict"] == "contradicted"
