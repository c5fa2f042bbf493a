"""Does a memory help to find what a long text said once?

The paper (§4.2) extends its models from 4,096 to 32,768 tokens with YaRN. At
equal loss before the extension (an earlier checkpoint of the model with the
memory) it finds that multi-query needles rise from 84 to 97 and variable
tracking from 77 to 87, other needles little: memory takes local patterns off
attention's hands. Asked here: the same, with every token of a run seen once.

Models are trained on short sequences of code and of the tasks, then on a few
long ones with stretched positions:

  experts              experts alone
  memory, equal loss   with a memory at equal parameters, from the checkpoint
                       whose validation loss is nearest to that of `experts`
  memory, equal text   the same run's last checkpoint

An answer counts if every token of it is the most likely one after the true
tokens before it. Tasks as small as these are learnt only by training on them.

  python -m experiments.lab.long_context --scale=cpu
"""

import dataclasses
from typing import Any

import numpy as np

from engram_jax.analysis.answers import score_answers
from engram_jax.config import ModelConfig, YarnConfig
from engram_jax.data.synthetic.questions import question_batch
from engram_jax.training.runs import RunFolder, load_run
from experiments.lab.long_context_report import (
  EXPERTS,
  MEMORY_LOSS,
  MEMORY_TEXT,
  analyze,
  draw,
)
from experiments.lab.long_texts import SIZES, TASKS, ask, corpus_of_stage
from experiments.lab.runs import Laboratory, Run, Trained
from experiments.lab.study import Study, tuned_learning_rate

#: Rate of the second stage over that of the first; the paper gives none.
LONG_RATE = 0.3

# Tokens of questions that are scored at a time.
_TOKENS_AT_A_TIME = 8192


def short_runs(lab: Laboratory) -> list[Run]:
  """The first stage: both models, every seed."""
  scale, sizes = lab.scale, SIZES[lab.scale.name]
  rate, corpus = tuned_learning_rate(lab), corpus_of_stage(lab, "short")
  steps = sizes.short_tokens // (sizes.batch_size * sizes.short)
  return [
    Run(
      f"short {name}",
      lab.config(
        model,
        tokens=sizes.short_tokens,
        seed=seed,
        learning_rate=rate,
        corpus=corpus,
        steps=steps,
        batch_size=sizes.batch_size,
        seq_len=sizes.short,
        warmup_steps=max(1, steps // 20),
        checkpoint_every=max(1, steps // sizes.checkpoints),
        keep_last=sizes.checkpoints + 1,
      ),
      {"model": name},
    )
    for seed in scale.seeds
    for name, model in (
      (EXPERTS, scale.model),
      ("memory", scale.with_memory()),
    )
  ]


def measure_short(lab: Laboratory, trained: Trained) -> dict[str, Any]:
  """Validation loss of every checkpoint, by its step."""
  losses = {}
  for step in RunFolder.of(trained.folder).saved_steps():
    found = load_run(trained.folder, step=step)
    at_step = dataclasses.replace(
      trained, model=found.model, tables=found.tables
    )
    losses[step] = lab.losses_on(at_step, trained.data, "validation")["on"]
  return {"losses": losses}


def runs(lab: Laboratory) -> list[Run]:
  """Makes the first stage, and gives the second, which starts from it."""
  first = short_runs(lab)
  records = lab.measure_all(
    first,
    lambda trained: measure_short(lab, trained),
    name="long_context_short",
    keep=True,
  )
  found = {
    (run.labels["model"], run.seed): (run, _losses(record))
    for run, record in zip(first, records, strict=True)
    if "losses" in record
  }
  corpus = corpus_of_stage(lab, "long")
  second = []
  for (model, seed), (run, losses) in found.items():
    last = max(losses)
    starts = {EXPERTS: last}
    rival = found.get((EXPERTS, seed))
    if model != EXPERTS:
      starts = {MEMORY_TEXT: last}
      if rival is not None:
        goal = rival[1][max(rival[1])]
        nearest = min(losses, key=lambda s: abs(losses[s] - goal))
        starts = {MEMORY_LOSS: nearest, **starts}
    for name, step in starts.items():
      labels = {
        "model": name,
        "share_of_text": step / last,
        "short_loss": losses[step],
        "rivals_short_loss": rival and rival[1][max(rival[1])],
      }
      config = _long_config(lab, run, corpus)
      second.append(Run(name, config, labels, run.digest, step))
  return second


def _losses(record: dict[str, Any]) -> dict[int, float]:
  return {int(s): x for s, x in record.get("losses", {}).items()}


def _long_config(lab: Laboratory, run: Run, corpus):
  """The second stage of a run."""
  sizes = SIZES[lab.scale.name]
  model: ModelConfig = run.config.model
  yarn = YarnConfig(scale=float(sizes.stretch), original_length=sizes.short)
  attention = dataclasses.replace(model.attention, yarn=yarn)
  batch_size = max(1, sizes.batch_size // sizes.stretch)
  steps = sizes.long_tokens // (batch_size * sizes.long)
  return lab.config(
    dataclasses.replace(model, attention=attention),
    tokens=sizes.long_tokens,
    seed=run.seed,
    learning_rate=LONG_RATE * run.config.train.learning_rate,
    corpus=corpus,
    steps=steps,
    batch_size=batch_size,
    seq_len=sizes.long,
    warmup_steps=max(1, steps // 10),
  )


def measure(lab: Laboratory, trained: Trained) -> dict[str, Any]:
  """The loss of long text, and the share of right answers.

  Returns:
    `loss`; `accuracy` by task, length and depth; `chance` by task.
  """
  sizes, tokenizer = SIZES[lab.scale.name], trained.data.tokenizer
  accuracy: dict[str, Any] = {}
  chance: dict[str, float] = {}
  for task, config in TASKS.items():
    accuracy[task] = {}
    for length in sizes.lengths:
      accuracy[task][length] = {}
      for depth in sizes.depths:
        questions = ask(
          tokenizer, config, length=length, depth=depth, count=sizes.questions
        )
        chance[task] = questions[0].chance
        right = _share_right(trained, questions, length)
        accuracy[task][length][depth] = right
  loss = lab.losses_on(trained, trained.data, "validation")
  return {"loss": loss, "accuracy": accuracy, "chance": chance}


def _share_right(trained: Trained, questions: list, length: int) -> float:
  """Share of the questions whose whole answer is right."""
  size = min(len(questions), max(1, _TOKENS_AT_A_TIME // length))
  right: list[bool] = []
  for start in range(0, len(questions), size):
    asked = questions[start : start + size]
    # The last batch is filled up, so that all have one shape.
    filled = asked + questions[: size - len(asked)]
    batch = question_batch(trained.data.tokenizer, filled, seq_len=length)
    found = score_answers(
      trained.model, trained.memory, trained.tables or None, batch
    )
    right += np.asarray(found.is_right)[: len(asked)].tolist()
  return float(np.mean(right))


STUDY = Study("long_context", runs, measure, analyze, draw)

if __name__ == "__main__":
  STUDY.main()
