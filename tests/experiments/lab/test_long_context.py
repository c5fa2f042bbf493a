"""The study of long context: its text, its questions, and what follows."""

import itertools

import pytest

from engram_jax.data.synthetic import needles, tracking
from engram_jax.data.synthetic.questions import encode
from engram_jax.data.tokenizers import train_tokenizer
from engram_jax.errors import InputError
from experiments.lab.long_context_report import (
  EXPERTS,
  MEMORY_LOSS,
  MEMORY_TEXT,
  analyze,
  draw,
)
from experiments.lab.long_texts import TASKS, ask, corpus_of_stage


def texts(lab, stage):
  folder = corpus_of_stage(lab, stage).folder
  return {path.read_text() for path in folder.rglob("*.txt")}


@pytest.fixture(scope="module")
def tokenizer(lab):
  return train_tokenizer(sorted(texts(lab, "short")), vocab_size=512)


def test_no_text_is_in_both_stages_and_no_question_in_either(lab, tokenizer):
  short, long = texts(lab, "short"), texts(lab, "long")
  assert short and long and not short & long
  haystacks = {text.split("\n")[0] for text in short | long}
  for config in TASKS.values():
    for question in ask(tokenizer, config, length=128, depth=0.5, count=4):
      assert question.prompt.split("\n")[0] not in haystacks


@pytest.mark.parametrize("task", TASKS)
def test_questions_are_as_long_as_they_may_be(tokenizer, task):
  config, oracle = TASKS[task], needles.oracle
  if isinstance(config, tracking.TrackingConfig):
    oracle = tracking.oracle
  for length in (128, 300):
    asked = ask(tokenizer, config, length=length, depth=0.5, count=4)
    found = [sum(map(len, encode(tokenizer, x))) for x in asked]
    assert 0.8 * length < max(found) <= length
    assert all(oracle(x.prompt) == x.answer for x in asked)
  with pytest.raises(InputError, match="length"):
    ask(tokenizer, config, length=8, depth=0.5, count=2)


def record(model, seed, share, *, loss=2.0):
  by_length = {length: {"0.1": share, "0.9": share} for length in ("64", "128")}
  return {
    "group": model,
    "seed": seed,
    "labels": {
      "model": model,
      "short_loss": loss,
      "rivals_short_loss": 2.0,
      "share_of_text": 0.6,
    },
    "accuracy": {task: by_length for task in TASKS},
    "chance": dict.fromkeys(TASKS, 0.02),
    "loss": {"on": loss},
  }


def records(experts, memory, *, loss=2.0):
  return [
    record(model, seed, share + 0.01 * seed * (model != EXPERTS), loss=x)
    for seed, (model, share, x) in itertools.product(
      range(3),
      [
        (EXPERTS, experts, 2.0),
        (MEMORY_LOSS, memory, loss),
        (MEMORY_TEXT, memory, 1.9),
      ],
    )
  ]


@pytest.mark.parametrize(
  ("experts", "memory", "loss", "verdict"),
  [
    (0.5, 0.8, 2.0, "reproduced"),
    (0.8, 0.5, 2.0, "contradicted"),
    (0.5, 0.49, 2.0, "not seen"),
    # Not at equal loss; and nothing learnt.
    (0.5, 0.8, 1.9, "too weak to tell"),
    (0.02, 0.03, 2.0, "too weak to tell"),
  ],
)
def test_the_verdict_follows_the_differences(
  lab, experts, memory, loss, verdict
):
  found = analyze(lab, records(experts, memory, loss=loss))
  assert found["verdict"] == verdict
  difference = found["differences"][MEMORY_LOSS]["the paper's two"]
  assert difference["mean"] == pytest.approx(memory - experts + 0.01)
  gap = found["before_extension"][MEMORY_LOSS]["largest_gap"]
  assert gap == pytest.approx(2.0 - loss)
  assert found["longest"] == 128
  assert len(found["accuracy"]) == 3 * 2 * len(TASKS) * 3


def test_a_model_alone_tells_nothing_and_is_drawn_all_the_same(lab, tmp_path):
  found = analyze(lab, [record(EXPERTS, 0, 0.5)])
  assert found["verdict"] == "too weak to tell"
  draw(found, tmp_path / "x.png")
  assert (tmp_path / "x.png").stat().st_size > 10_000
