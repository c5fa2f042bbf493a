"""One training step on one long sequence: memory, time, and the same loss.

  python -m experiments.benchmarks.long_sequence
  python -m experiments.benchmarks.long_sequence --quick

The whole step of `training.step` on random tokens, batch 1, each in a process
of its own, in two forms of the preset's model:

  plain      all queries with all keys, all logits at once; every activation is
             kept for the gradient; blocks one by one
  blockwise  attention and loss in pieces, blocks in a loop, of which only the
             residual streams are kept

To reach: the longest sequence, blockwise, within 24 GiB, and at the shortest
the loss of the plain form.

`temp_mib` is what XLA allocates besides state and batch: exact, and without
what compilation leaves behind in `peak_mib`. `mib_per_1000` is how it grows
from one line to the next per 1,000 tokens: constant where memory is linear in
the length. A plain step that does not fit is compiled, to know its memory, and
not run.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import jax

from engram_jax.analysis.compiled import memory_report
from engram_jax.config import ModelConfig
from engram_jax.errors import InputError, require
from engram_jax.presets import preset as find_preset
from engram_jax.run_config import TrainConfig
from engram_jax.training.step import make_train_step
from experiments.benchmarks import harness, models

FORMS = ("plain", "blockwise")
TARGET_GIB = 24
#: Of the loss, relative: the forms sum in another order.
TOLERANCE = 1e-5
FLAGS = {
  "preset": ("small", "Of engram_jax/presets.py."),
  "lengths": ([2048, 4096, 8192, 16384, 32768], "Blockwise, ascending."),
  "plain_lengths": ([4096, 8192], "Plain too, besides the first of --lengths."),
  "block_size": (512, "Of the blockwise attention."),
  "loss_chunk": (1024, "Of the blockwise loss."),
  "quick": (False, "Short sequences: does it work?"),
}
QUICK = {
  "lengths": [128, 256, 512],
  "plain_lengths": [256],
  "block_size": 32,
  "loss_chunk": 64,
}


def in_form(
  form: str,
  model: ModelConfig,
  train: TrainConfig,
  *,
  block_size: int,
  loss_chunk: int,
) -> tuple[ModelConfig, TrainConfig]:
  """The same model and training, computed in one of `FORMS`."""
  require(form in FORMS, "form", form, f"one of {', '.join(FORMS)}")
  whole = form == "plain"
  model = dataclasses.replace(
    model,
    attention=dataclasses.replace(
      model.attention, block_size=0 if whole else block_size
    ),
    scan_blocks=not whole,
    remat="none" if whole else "block",
  )
  return model, dataclasses.replace(
    train, loss_chunk=0 if whole else loss_chunk
  )


def one_step(
  *, preset: str, length: int, form: str, **pieces: int
) -> harness.Figures:
  """Compiles one step and takes it.

  Args:
    preset: a name of `presets.PRESETS`.
    length: tokens of the sequence.
    form: one of `FORMS`.
    **pieces: `block_size` and `loss_chunk`, where it is blockwise.

  Returns:
    `loss`, `grad_norm`, `compile_s`, `step_s`, `state_mib` and `temp_mib`. A
    plain step that does not fit has `refused_by`, the reason, instead of what
    it would have computed.

  Raises:
    InputError: no such preset or form, or a blockwise step that does not fit.
  """
  found = find_preset(preset)
  train = dataclasses.replace(
    found.train, batch_size=1, seq_len=length, accumulation=1
  )
  setup = models.make_setup(*in_form(form, found.model, train, **pieces))
  state, compiled = setup.abstract_state(), None

  def build():
    nonlocal compiled
    step = make_train_step(setup)
    compiled = step.lower(state, models.abstract_batch(1, length)).compile()

  seconds = harness.seconds(build)
  memory = memory_report(compiled)
  answer = {
    "compile_s": seconds,
    "state_mib": round(memory["argument"] / harness.MIB, 1),
    "temp_mib": round(memory["temp"] / harness.MIB, 1),
  }
  try:
    needed = memory["argument"] + memory["temp"]
    harness.require_memory("length", length, needed)
  except InputError as error:
    if form != "plain":
      raise
    return {**answer, "refused_by": str(error)}
  state = jax.block_until_ready(setup.init_state())
  take = models.steps(compiled, state, models.make_batches(setup, 1))
  del state
  metrics = {}
  seconds = harness.seconds(lambda: metrics.update(take()))
  values = {name: float(metrics[name]) for name in ("loss", "grad_norm")}
  return {**answer, "step_s": seconds, **values}


def growth(records: Sequence[harness.Figures]) -> None:
  """Adds `mib_per_1000` to all records but the first."""
  for before, record in itertools.pairwise(records):
    more = record["temp_mib"] - before["temp_mib"]
    tokens = record["length"] - before["length"]
    record["mib_per_1000"] = 1000 * more / tokens


def measure(
  *,
  preset: str,
  lengths: Sequence[int],
  plain_lengths: Sequence[int],
  quick: bool,
  **pieces: int,
) -> harness.Figures:
  """All lengths in both forms; arguments as the flags.

  Returns:
    The records `plain` and `blockwise`, ascending by length, and `targets`.
  """
  del quick  # the flags' defaults are others
  ascending = lengths and sorted(set(lengths)) == lengths
  require(ascending, "lengths", lengths, "one or more numbers, ascending")
  find_preset(preset)
  wanted = dict(zip(FORMS, ([lengths[0], *plain_lengths], lengths)))
  by_form: dict[str, list] = {form: [] for form in FORMS}
  for form, records in by_form.items():
    for length in dict.fromkeys(wanted[form]):
      about = {"form": form, "length": length}
      answer = harness.in_child(one_step, preset=preset, **about, **pieces)
      records.append(about | answer)
    growth(records)
  (plain, *_), (first, *_) = by_form.values()
  valid = "a length at which the plain form fits, to compare with"
  require("loss" in plain, "lengths", lengths, valid)
  peak = by_form["blockwise"][-1]["peak_mib"] / 1024
  apart = abs(first["loss"] / plain["loss"] - 1)
  targets = {
    "peak_gib": harness.target(peak, at_most=TARGET_GIB),
    "loss_difference": harness.target(apart, at_most=TOLERANCE),
  }
  return {"targets": targets, **by_form}


def tables(result: harness.Figures) -> list[str]:
  names = "form length compile_s step_s state_mib temp_mib mib_per_1000"
  names = [*names.split(), "peak_mib", "loss", "grad_norm"]
  records = [record for form in FORMS for record in result[form]]
  refused = [r["refused_by"] for r in records if "refused_by" in r]
  found = harness.table(dict(zip(names, names)), records)
  return [found, *(f"plain, {reason}" for reason in refused)]


BENCHMARK = harness.Benchmark(measure, tables, FLAGS, when={"quick": QUICK})

if __name__ == "__main__":
  harness.run(BENCHMARK)
