"""Two memories swapped over one backbone; a small memory grown.

The rows of the names are taught, and the backbone and the fusion stay frozen.
"""

import dataclasses
import itertools
from typing import Any

import jax
import numpy as np

from engram_jax.backbone.growth import grow_transformer
from engram_jax.data.pipeline import batches
from engram_jax.data.synthetic.facts import questions
from engram_jax.memory.growth import add_orders, multiply_rows
from experiments.lab.edits import (
  PARAPHRASES,
  TAUGHT,
  lesson,
  lesson_batches,
  teach_rows,
)
from experiments.lab.runs import Laboratory, Trained
from experiments.lab.worlds import (
  ask_all,
  attribute_facts,
  summarize,
  world_of,
)

FACTORS = {"smoke": (3,), "cpu": (3, 9), "gpu": (3, 9)}
#: Steps of rows alone for each grown memory; the same text for all.
GROWTH_STEPS = {"smoke": 2, "cpu": 150, "gpu": 2000}
#: Facts of entities never spoken of that one memory is taught, and the steps.
SWAP_FACTS = {"smoke": 8, "cpu": 60, "gpu": 512}
SWAP_STEPS = {"smoke": 4, "cpu": 150, "gpu": 960}
SWAP_RATE = 0.03


def measure_swap(lab: Laboratory, trained: Trained) -> dict[str, Any]:
  """Right answers of each memory on each set of facts."""
  scale, world = lab.scale.name, world_of(lab)
  facts = attribute_facts(world, 0)
  np.random.default_rng(trained.run.seed).shuffle(facts)
  count = min(SWAP_FACTS[scale], len(facts) // 2)
  sets = {"A": facts[:count], "B": facts[count : 2 * count]}
  memories, tokenizer = {"before": trained}, trained.data.tokenizer
  for name, chosen in sets.items():
    taught = lesson_batches(tokenizer, lesson(chosen, TAUGHT), name_rows=True)
    memories[f"taught {name}"] = teach_rows(
      trained, taught, learning_rate=SWAP_RATE, steps=SWAP_STEPS[scale]
    )
  asked = {
    f"facts {name}": lesson(chosen, PARAPHRASES[:1]).questions
    for name, chosen in sets.items()
  }
  asked["what was known"] = list(questions(world, held_out=False))
  return {
    name: {
      kind: summarize(ask_all(taught, q))["accuracy"]
      for kind, q in asked.items()
    }
    for name, taught in memories.items()
  }


def measure_growth(lab: Laboratory, trained: Trained) -> dict[str, Any]:
  """Recall before and after training rows alone, for each way to grow."""
  scale, world = lab.scale.name, world_of(lab)
  memory, key = trained.memory, jax.random.key(trained.run.seed)
  grown = {"as it is": (memory, trained.tables)}
  for factor in FACTORS[scale]:
    larger = multiply_rows(memory, trained.tables, factor=factor)
    grown[f"{factor} x rows"] = larger
  # As many new rows as three times the old ones have.
  rows = (4 * memory.config.rows_per_head[0],)
  grown["4-grams added"] = add_orders(
    memory, trained.tables, rows_per_head=rows
  )
  train, steps = trained.config.train, GROWTH_STEPS[scale]
  text = batches(
    trained.data,
    "train",
    seq_len=train.seq_len,
    batch_size=train.batch_size,
    seed=train.seed + 1,
  )
  text = list(itertools.islice(text, steps))
  # The rate at which the run's own tables ended.
  rate = train.learning_rate * train.table_learning_rate_multiplier
  rate *= train.decay_factors[0]
  asked = list(questions(world, held_out=False))

  def recall(larger: Trained) -> dict[str, Any]:
    found = ask_all(larger, asked)
    frequencies = summarize(found, by="frequency")
    return {
      "accuracy": summarize(found)["accuracy"],
      "by_frequency": {f: x["accuracy"] for f, x in frequencies.items()},
    }

  records: dict[str, Any] = {"before": recall(trained)}
  likely = ask_all(trained, asked).bits
  for name, (larger, tables) in grown.items():
    config = dataclasses.replace(trained.setup.model, engram=larger.config)
    start = dataclasses.replace(
      trained,
      setup=dataclasses.replace(trained.setup, model=config, memory=larger),
      model=grow_transformer(trained.model, larger.config, key=key),
      tables=tables,
    )
    change = np.abs(ask_all(start, asked).bits - likely).max()
    after = teach_rows(start, text, learning_rate=rate, steps=steps)
    records[name] = recall(after) | {
      "table_parameters": sum(table.size for table in tables.values()),
      "largest_change_by_growth": float(change),
    }
  return records
