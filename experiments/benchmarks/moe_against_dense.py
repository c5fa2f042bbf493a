"""Tokens/s of a mixture of experts against a dense model of equal activation.

  python -m experiments.benchmarks.moe_against_dense

The whole training step of `training.step`, on random tokens, of

  dense        no experts; its SwiGLUs as wide as gives the same number of
               activated parameters (without the vocabulary) as `moe`
  moe          the preset without its memory
  moe, memory  the preset

In turns in one process. Random tokens at the start of training do not change
what a step costs: the buckets have their size whatever is in them.

Then what the difference comes from. Variants of `moe` that change one thing
(`VARIANTS`), in turns with it; and a profile of one step of `dense` and of
`moe`: which operation of the compiled program was running, by the part of the
library that it comes from and by kind (`step_profile.py`).
"""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from engram_jax.analysis import estimates
from engram_jax.analysis.accounting import (
  count_parameters_by_part,
  counting_hash,
)
from engram_jax.config import ModelConfig
from engram_jax.errors import require
from engram_jax.presets import preset as find_preset
from engram_jax.run_config import TrainConfig
from engram_jax.training.runs import new_state
from engram_jax.training.step import make_train_step
from experiments.benchmarks import harness
from experiments.benchmarks.compile_time import make_program
from experiments.benchmarks.scaling_runs import make_batches
from experiments.benchmarks.step_profile import profile, profile_tables

HERE = "experiments.benchmarks.moe_against_dense"

# --- the models ---


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


def _experts(**changes: Any) -> Callable[[ModelConfig], ModelConfig]:
  """A function that changes fields of the experts' config."""

  def change(model):
    moe = model.moe
    fields = {
      name: value(moe) if callable(value) else value
      for name, value in changes.items()
    }
    return dataclasses.replace(model, moe=dataclasses.replace(moe, **fields))

  return change


#: What is made of the preset without memory, `moe`. All of the variants
#: activate the same but for the router.
VARIANTS: dict[str, Callable[[ModelConfig], ModelConfig]] = {
  "moe": lambda model: model,
  "dropless": _experts(dispatch="dropless"),
  "capacity 1": _experts(capacity_factor=1.0),
  "half the experts": _experts(num_experts=lambda m: m.num_experts // 2),
  "twice the experts": _experts(num_experts=lambda m: 2 * m.num_experts),
  "finer experts": _experts(
    num_experts=lambda m: 2 * m.num_experts,
    top_k=lambda m: 2 * m.top_k,
    expert_size=lambda m: m.expert_size // 2,
    num_shared=lambda m: 2 * m.num_shared,
  ),
}
CONTEST = ("dense", "moe", "moe, memory")


def models(model: ModelConfig) -> dict[str, ModelConfig]:
  """All models by name, from a preset's.

  Raises:
    InputError: the preset has no experts, or no memory.
  """
  require(model.moe is not None, "preset", "a dense model", "one with experts")
  valid = "a preset with a memory"
  require(model.engram is not None, "preset", "no memory", valid)
  plain = dataclasses.replace(model, engram=None)
  return {
    "dense": equal_dense(plain),
    "moe, memory": model,
    **{name: change(plain) for name, change in VARIANTS.items()},
  }


# --- the runs ---


class Run:
  """A run whose every call is one step.

  Attributes:
    compiled: the step.
    flops: of one step: its dots, loops included.
  """

  def __init__(self, model: ModelConfig, train: TrainConfig):
    program = make_program(model, train)
    sizes = {
      "batch": train.batch_size,
      "length": train.seq_len,
      "vocab_size": model.vocab_size,
    }
    batches = make_batches(sizes, 4)
    self._state = new_state(program)
    step = make_train_step(program)
    self.compiled = step.lower(self._state, batches[0]).compile()
    self._batches = itertools.cycle(batches)
    work = estimates.work(self.compiled.as_text())
    self.flops = sum(o.times * o.flops for o in work.operations)

  def __call__(self) -> Any:
    self._state, metrics = self.compiled(self._state, next(self._batches))
    return metrics


def measure(
  *,
  preset: str,
  names: Sequence[str],
  batch: int,
  length: int,
  repeats: int,
  profiled: Sequence[str] = (),
) -> dict[str, Any]:
  """Times steps of several models in turns, in this process.

  Args:
    preset: a name of `presets.PRESETS`.
    names: of `models`.
    batch: sequences of a step.
    length: tokens of a sequence.
    repeats: timed steps of each.
    profiled: those of `names` of which a step is profiled.

  Returns:
    `records`, one per name: `activated` and `total` parameters without the
    vocabulary, the times of `harness.interleaved`, `tokens_per_s` of the
    median, `gflops` of a step, `gflops_per_s`, `dropped` (share of the
    assignments) and `loss` of the last step; `profiles` by name, from
    `profile`.

  Raises:
    InputError: no such preset or model, or a preset without experts.
  """
  found = find_preset(preset)
  every = models(found.model)
  for name in [*names, *profiled]:
    require(name in every, "names", name, f"of {', '.join(every)}")
  train = dataclasses.replace(
    found.train, batch_size=batch, seq_len=length, accumulation=1
  )
  runs = {name: Run(every[name], train) for name in names}
  times = harness.interleaved(runs, repeats=repeats)
  records = []
  for name, run in runs.items():
    parameters, metrics = counts(every[name]), run()
    taken, tokens, moe = times[name], batch * length, every[name].moe
    dropped = None
    if moe is not None:
      assignments = tokens * moe.top_k * len(metrics["max_violation"])
      dropped = float(metrics["dropped"]) / assignments
    records.append(
      {
        "model": name,
        "activated": parameters["activated_without_embedding"],
        "total": parameters["total_without_embedding"],
        **taken,
        "tokens_per_s": 1e3 * tokens / taken["median_ms"],
        "gflops": run.flops / 1e9,
        "gflops_per_s": run.flops / 1e6 / taken["median_ms"],
        "dropped": dropped,
        "loss": float(metrics["loss"]),
      }
    )
  profiles = {name: profile(runs[name]) for name in profiled}
  return {"records": records, "profiles": profiles}


# --- the report ---


def define_flags() -> None:
  harness.define_common("moe_against_dense", repeats=7)
  flags.DEFINE_string("preset", "small", "Of engram_jax/presets.py.")
  flags.DEFINE_integer("batch", 4, "Sequences of a step.")
  flags.DEFINE_integer("length", 512, "Tokens of a sequence.")
  flags.DEFINE_list("variants", list(VARIANTS)[1:], "Of `moe`, one by one.")


def main(argv: Sequence[str]) -> None:
  del argv
  args = flags.FLAGS
  variants = ["moe", *args.variants]
  for name in variants:
    require(name in VARIANTS, "variants", name, f"of {', '.join(VARIANTS)}")

  def child(names, **options):
    print(f"measuring {'; '.join(names)} ...", file=sys.stderr, flush=True)
    return harness.in_child(
      f"{HERE}:measure",
      preset=args.preset,
      names=names,
      batch=args.batch,
      length=args.length,
      repeats=args.repeats,
      **options,
    )

  contest = child(CONTEST, profiled=["dense", "moe"])
  varied = child(variants) if args.variants else None
  result = {
    "preset": args.preset,
    "batch": args.batch,
    "length": args.length,
    "repeats": args.repeats,
  }
  columns = (
    "model activated total median_ms min_ms first_s tokens_per_s gflops "
    "gflops_per_s dropped"
  ).split()
  tables = [f"{args.preset}: {args.batch} sequences of {args.length} tokens"]
  groups = {"contest": ("dense", contest), "variants": ("moe", varied)}
  for group, (base, answer) in groups.items():
    if answer is None:
      continue
    records = answer["records"]
    (speed,) = (r["tokens_per_s"] for r in records if r["model"] == base)
    for record in records:
      record["ratio"] = record["tokens_per_s"] / speed
    result[group] = {"over": base, **answer}
    rows = [[*(r[n] for n in columns), r["ratio"]] for r in records]
    tables.append(harness.aligned([*columns, f"over {base}"], rows))
  result["profile"] = result["contest"].pop("profiles")
  if "variants" in result:
    del result["variants"]["profiles"]
  tables += profile_tables(result["profile"])
  harness.publish(result, tables)


if __name__ == "__main__":
  harness.launch(define_flags, main)
