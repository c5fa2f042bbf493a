"""New facts for a trained model: by rows alone, and by LoRA.

An edit gives known entities another value. It is taught in some wordings, and
judged by

  efficacy    right answers in these wordings
  paraphrase  right answers in the other wordings
  locality    what else changed: other facts of the same entities, facts of
              other entities (right answers, and KL of the answers), and the
              loss of held-out text
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers

from engram_jax.analysis.answers import answer_divergence
from engram_jax.data.synthetic.facts import (
  TEMPLATES,
  Fact,
  ask,
  values_of,
)
from engram_jax.data.synthetic.questions import Question
from engram_jax.memory.row_sparse import row_sparse
from engram_jax.training.lora import (
  ATTENTION,
  count_lora,
  init_lora,
  make_lora_step,
  merge_lora,
)
from engram_jax.training.rows_only import (
  RowsState,
  rows_only_step,
  touched_rows,
)
from experiments.lab.runs import Laboratory, Trained
from experiments.lab.worlds import (
  ask_all,
  attribute_facts,
  question_batches,
  summarize,
  world_of,
)

# All are wordings of the text: others say little even of well-known facts.
TAUGHT, PARAPHRASES = TEMPLATES[:3], TEMPLATES[3:]
#: Facts that one edit changes, each of another entity.
EDITED = {"smoke": 2, "cpu": 12, "gpu": 64}
#: Facts of other entities that must stay.
OTHERS = 128
STEPS = {"smoke": 3, "cpu": 60, "gpu": 60}
ROW_TX = row_sparse(optax.scale_by_adam())
LORA_TX = optax.inject_hyperparams(optax.adam)(learning_rate=0.0)
#: Learning rates that are tried, of rows and of LoRA.
ROW_RATES = {"smoke": (0.03,), "cpu": (0.01, 0.03, 0.1), "gpu": (0.01, 0.03)}
LORA_RATES = {"smoke": (0.01,), "cpu": (0.003, 0.01, 0.03), "gpu": (3e-3, 0.01)}

_teach_rows = jax.jit(
  rows_only_step, static_argnames=("row_optimizer",), donate_argnums=0
)
_lora_step = functools.cache(lambda memory: make_lora_step(memory, LORA_TX))


class Lesson(NamedTuple):
  """Questions with their answers, to be taught.

  Attributes:
    questions: each in one wording.
    subjects: the entity that each is about.
  """

  questions: list[Question]
  subjects: list[str]


def lesson(facts: Sequence[Fact], templates: Sequence[str]) -> Lesson:
  """All facts in all wordings."""
  pairs = [(fact, template) for template in templates for fact in facts]
  return Lesson([ask(*pair) for pair in pairs], [f.entity for f, _ in pairs])


def lesson_batches(
  tokenizer: tokenizers.Tokenizer, taught: Lesson, *, name_rows: bool
) -> list[dict[str, np.ndarray]]:
  """Batches to be taught.

  Args:
    tokenizer: the model's.
    taught: what is taught.
    name_rows: let only those rows move that are read where an entity's name
      ends, which are those of its own n-grams; else all that are read.
  """
  batches = question_batches(tokenizer, taught.questions)
  size, length = batches[0]["inputs"].shape
  masks = np.full((len(batches) * size, length), not name_rows)
  for i, (question, subject) in enumerate(zip(*taught) if name_rows else ()):
    end = question.prompt.index(subject) + len(subject)
    offsets = tokenizer.encode(question.prompt).offsets
    masks[i, [stop for _, stop in offsets].index(end)] = True
  found = []
  for batch, mask in zip(batches, masks.reshape(len(batches), size, length)):
    # What comes after the answer has no part in it.
    backwards = np.cumsum(batch["loss_mask"][:, ::-1], axis=1)[:, ::-1]
    found.append(batch | {"row_mask": mask & (backwards > 0)})
  return found


def teach_rows(
  trained: Trained,
  batches: Sequence[dict[str, np.ndarray]],
  *,
  learning_rate: float,
  steps: int,
) -> Trained:
  """The run with rows that were taught; its weights are the same arrays."""
  state = RowsState.create(trained.memory, trained.tables, ROW_TX)
  for i in range(steps):
    state, _ = _teach_rows(
      state,
      trained.model,
      batches[i % len(batches)],
      memory=trained.memory,
      row_optimizer=ROW_TX,
      learning_rate=learning_rate,
    )
  return dataclasses.replace(trained, tables=state.tables)


def teach_lora(
  trained: Trained,
  batches: Sequence[dict[str, np.ndarray]],
  *,
  rank: int,
  learning_rate: float,
  steps: int,
) -> Trained:
  """The run with a low-rank addition to its attention; its tables stay."""
  key = jax.random.key(trained.run.seed)
  lora = init_lora(key, trained.model, rank=rank, matrices=ATTENTION)
  # The rate is part of the state: all rates are one compiled step.
  step, opt_state = _lora_step(trained.memory), LORA_TX.init(lora)
  opt_state.hyperparams["learning_rate"] = jnp.asarray(learning_rate)
  for i in range(steps):
    batch = batches[i % len(batches)]
    arguments = (trained.model, trained.tables, batch)
    lora, opt_state, _ = step(lora, opt_state, *arguments)
  return dataclasses.replace(trained, model=merge_lora(trained.model, lora))


def measure_edits(lab: Laboratory, trained: Trained) -> list[dict[str, Any]]:
  """One record for each method and rate, and one of the model before."""
  world, scale = world_of(lab), lab.scale.name
  tokenizer = trained.data.tokenizer
  rng = np.random.default_rng(trained.run.seed)
  best = attribute_facts(world, max(world.frequencies))
  rng.shuffle(best)
  edited: dict[str, Fact] = {}
  for fact in best:
    if len(edited) < EDITED[scale] and fact.entity not in edited:
      words = [v for v in values_of(world)[fact.attribute] if v != fact.value]
      value = str(rng.choice(words))
      edited[fact.entity] = dataclasses.replace(fact, value=value)
  changed = {(fact.entity, fact.attribute) for fact in edited.values()}
  kept = [f for f in best if (f.entity, f.attribute) not in changed]
  facts = list(edited.values())
  asked = {
    "efficacy": lesson(facts, TAUGHT).questions,
    "paraphrase": lesson(facts, PARAPHRASES).questions,
    "same entities": lesson(
      [f for f in kept if f.entity in edited], PARAPHRASES[:1]
    ).questions,
    "other entities": lesson(
      [f for f in kept if f.entity not in edited][:OTHERS],
      PARAPHRASES[:1],
    ).questions,
  }
  name_batches, all_batches = (
    lesson_batches(tokenizer, lesson(facts, TAUGHT), name_rows=name_rows)
    for name_rows in (True, False)
  )
  width = trained.memory.config.head_dim
  numbers = [
    width * sum(len(ids) for ids in touched_rows(trained.memory, b).values())
    for b in (name_batches, all_batches)
  ]
  one = init_lora(jax.random.key(0), trained.model, rank=1, matrices=ATTENTION)
  rank = max(1, round(numbers[0] / count_lora(one)))

  def judge(method: str, rate: float, count: int, after: Trained):
    found = {k: summarize(ask_all(after, q)) for k, q in asked.items()}
    divergence = [
      answer_divergence(
        trained.model,
        trained.tables,
        after.model,
        after.tables,
        trained.memory,
        batch,
      )
      for batch in question_batches(tokenizer, asked["other entities"])
    ]
    total = float(sum(np.sum(np.asarray(x)) for x in divergence))
    text = lab.losses_on(after, trained.data, "validation")["on"]
    return {
      "method": method,
      "rate": rate,
      "trained_numbers": count,
      "accuracy": {k: x["accuracy"] for k, x in found.items()},
      "divergence": total / len(asked["other entities"]),
      "text_loss": text,
    }

  records = [judge("before", 0.0, 0, trained)]
  steps = STEPS[scale]
  for rate in ROW_RATES[scale]:
    for method, batches, count in (
      ("rows of the names", name_batches, numbers[0]),
      ("all rows read", all_batches, numbers[1]),
    ):
      after = teach_rows(trained, batches, learning_rate=rate, steps=steps)
      records.append(judge(method, rate, count, after))
  for rate in LORA_RATES[scale]:
    after = teach_lora(
      trained, all_batches, rank=rank, learning_rate=rate, steps=steps
    )
    records.append(judge("LoRA", rate, rank * count_lora(one), after))
  return records
