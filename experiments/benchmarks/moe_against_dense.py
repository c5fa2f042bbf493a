"""Tokens/s of a mixture of experts against a dense model of equal activation.

  python -m experiments.benchmarks.moe_against_dense

The whole training step of `training.step`, on random tokens, in turns in one
process, of

  dense        no experts; its SwiGLUs as wide as gives the same number of
               activated parameters (without the vocabulary) as `moe`
  moe          the preset without its memory
  moe, memory  the preset
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from engram_jax.analysis import estimates
from engram_jax.analysis.accounting import (
  count_parameters_by_part,
  counting_hash,
)
from engram_jax.config import ModelConfig
from engram_jax.errors import require
from engram_jax.presets import preset as find_preset
from engram_jax.training.step import make_train_step
from experiments.benchmarks import harness
from experiments.benchmarks import models as runs

FLAGS = {
  "preset": ("small", "Of engram_jax/presets.py, with experts and a memory."),
  "batch": (4, "Sequences of a step."),
  "length": (512, "Tokens of a sequence."),
  "repeats": (9, "Timed steps of each."),
}


def counts(model: ModelConfig) -> dict[str, int]:
  """Its parameters by part."""
  return count_parameters_by_part(model, counting_hash(model))


def equal_dense(model: ModelConfig) -> ModelConfig:
  """The dense model that activates as many parameters per token.

  As near as one width of all SwiGLUs allows.
  """

  def activated(config):
    return counts(config)["activated_without_embedding"]

  def of_width(size):
    return dataclasses.replace(model, moe=None, engram=None, dense_size=size)

  one = activated(of_width(1))
  each = activated(of_width(2)) - one
  return of_width(1 + round((activated(model) - one) / each))


def models(model: ModelConfig) -> dict[str, ModelConfig]:
  """All models by name, from a preset's.

  Raises:
    InputError: the preset has no experts, or no memory.
  """
  require(model.moe is not None, "preset", "a dense model", "one with experts")
  valid = "a preset with a memory"
  require(model.engram is not None, "preset", "no memory", valid)
  plain = dataclasses.replace(model, engram=None)
  return {"dense": equal_dense(plain), "moe": plain, "moe, memory": model}


def contender(
  model: ModelConfig, train: Any
) -> tuple[Callable[[], Any], float]:
  """A function whose every call is one step, and the step's FLOP."""
  setup = runs.make_setup(model, train)
  batches, state = runs.make_batches(setup, 4), setup.init_state()
  compiled = make_train_step(setup).lower(state, batches[0]).compile()
  work = estimates.work(compiled.as_text())
  flops = sum(o.times * o.flops for o in work.operations)
  return runs.steps(compiled, state, batches), flops


def measure(
  *, preset: str, batch: int, length: int, repeats: int
) -> harness.Figures:
  """Times steps of all models in turns; arguments as the flags.

  Returns:
    `records`, one per name: `activated` and `total` parameters without the
    vocabulary, the times of `harness.interleaved`, `tokens_per_s` of the
    median and its `ratio` to the first, `gflops` of a step, `gflops_per_s`,
    `dropped` (share of the assignments) and `loss` of the last step.
  """
  found = find_preset(preset)
  train = dataclasses.replace(
    found.train, batch_size=batch, seq_len=length, accumulation=1
  )
  every = models(found.model)
  made = {name: contender(model, train) for name, model in every.items()}
  cases = {name: step for name, (step, _) in made.items()}
  times = harness.interleaved(cases, repeats=repeats)
  records = []
  for name, model in every.items():
    step, flops = made[name]
    metrics, dropped = step(), None
    if model.moe is not None:
      blocks = sum(model.is_moe(i) for i in range(model.num_layers))
      assignments = batch * length * model.moe.top_k * blocks
      dropped = float(metrics["dropped"]) / assignments
    seconds = times[name]["median_ms"] / 1e3
    parameters = counts(model)
    record = {
      "model": name,
      "activated": parameters["activated_without_embedding"],
      "total": parameters["total_without_embedding"],
      **times[name],
      "tokens_per_s": batch * length / seconds,
      "gflops": flops / 1e9,
      "gflops_per_s": flops / 1e9 / seconds,
      "dropped": dropped,
      "loss": float(metrics["loss"]),
    }
    records.append(record)
    record["ratio"] = record["tokens_per_s"] / records[0]["tokens_per_s"]
  return {"records": records}


def tables(result: harness.Figures) -> list[str]:
  columns = "model activated total median_ms min_ms tokens_per_s ratio gflops"
  columns += " gflops_per_s dropped loss"
  return [harness.table(columns.split(), result["records"])]


BENCHMARK = harness.Benchmark(measure, tables, FLAGS)

if __name__ == "__main__":
  harness.run(BENCHMARK)
