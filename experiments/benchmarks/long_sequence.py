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
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags

from engram_jax.analysis.compiled import memory_report
from engram_jax.config import ModelConfig
from engram_jax.errors import InputError, require
from engram_jax.presets import preset as find_preset
from engram_jax.run_config import TrainConfig
from engram_jax.training.runs import abstract_state, new_state
from engram_jax.training.step import make_train_step
from experiments import number_flags
from experiments.benchmarks import harness
from experiments.benchmarks.compile_time import abstract_batch, make_program
from experiments.benchmarks.scaling_runs import make_batches

HERE = "experiments.benchmarks.long_sequence"
FORMS = ("plain", "blockwise")
TARGET_GIB = 24
#: Of the loss, relative: the forms sum in another order.
TOLERANCE = 1e-5
#: What the flags are with --quick, where they are not given.
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
  attention = dataclasses.replace(
    model.attention, block_size=0 if whole else block_size
  )
  model = dataclasses.replace(
    model,
    attention=attention,
    scan_blocks=not whole,
    remat="none" if whole else "block",
  )
  chunk = 0 if whole else loss_chunk
  return model, dataclasses.replace(train, loss_chunk=chunk)


def measure(
  *, preset: str, length: int, form: str, block_size: int, loss_chunk: int
) -> dict[str, Any]:
  """Compiles one step and takes it.

  Args:
    preset: a name of `presets.PRESETS`.
    length: tokens of the sequence.
    form: one of `FORMS`.
    block_size: of the attention, where it is blockwise.
    loss_chunk: tokens whose logits exist at a time, where it is blockwise.

  Returns:
    `loss`, `grad_norm`, `compile_s`, `step_s`, `state_mib`, `temp_mib`, and
    `compiled_mib`, the process's peak before anything was allocated. A plain
    step that does not fit has `refused_by`, the reason, instead of what it
    would have computed.

  Raises:
    InputError: no such preset or form, or a blockwise step that does not fit.
  """
  found = find_preset(preset)
  train = dataclasses.replace(
    found.train, batch_size=1, seq_len=length, accumulation=1
  )
  model, train = in_form(
    form, found.model, train, block_size=block_size, loss_chunk=loss_chunk
  )
  program = make_program(model, train)
  state = abstract_state(program)
  start = time.perf_counter()
  lowered = make_train_step(program).lower(state, abstract_batch(1, length))
  compiled = lowered.compile()
  seconds = time.perf_counter() - start
  memory = memory_report(compiled)
  answer = {
    "compile_s": seconds,
    "state_mib": round(memory["argument"] / harness.MIB, 1),
    "temp_mib": round(memory["temp"] / harness.MIB, 1),
    "compiled_mib": round(harness.peak_memory() / harness.MIB, 1),
  }
  try:
    needed = memory["argument"] + memory["temp"]
    harness.require_memory("length", length, needed)
  except InputError as error:
    if form != "plain":
      raise
    return {**answer, "refused_by": str(error)}
  sizes = {"batch": 1, "length": length, "vocab_size": model.vocab_size}
  (batch,) = make_batches(sizes, 1)
  state = jax.block_until_ready(new_state(program))
  start = time.perf_counter()
  state, metrics = jax.block_until_ready(compiled(state, batch))
  return {
    **answer,
    "step_s": time.perf_counter() - start,
    "loss": float(metrics["loss"]),
    "grad_norm": float(metrics["grad_norm"]),
  }


def predicted(seconds: Mapping[int, float], length: int) -> float:
  """Seconds of a step at this length, from those of shorter ones.

  By a L + b L^2 through the two longest, with neither a nor b below 0; from one
  alone, b L^2: an upper bound.
  """
  (*_, last) = lengths = sorted(seconds)
  per_token = seconds[last] / last
  slope = per_token / last
  if len(lengths) > 1:
    other = lengths[-2]
    found = (per_token - seconds[other] / other) / (last - other)
    slope = min(max(found, 0.0), slope)
  return length * (per_token + slope * (length - last))


def growth(records: Sequence[dict[str, Any]]) -> None:
  """Adds `mib_per_1000` to all records but the first."""
  for before, record in itertools.pairwise(records):
    more = record["temp_mib"] - before["temp_mib"]
    tokens = record["length"] - before["length"]
    record["mib_per_1000"] = 1000 * more / tokens


def verdict(
  lines: Sequence[Mapping[str, Any]], plain: Mapping[str, Any]
) -> dict[str, Any]:
  """Whether the targets are reached.

  Args:
    lines: the blockwise records, ascending by length.
    plain: the plain record at the length of the first.
  """
  first, last = lines[0], lines[-1]
  peak = last["peak_mib"] / 1024

  def difference(name):
    return abs(first[name] / plain[name] - 1)

  return {
    "longest": last["length"],
    "peak_gib": peak,
    "peak_gib_at_most": TARGET_GIB,
    "peak_reached": peak <= TARGET_GIB,
    "compared_at": first["length"],
    "loss_difference": difference("loss"),
    "loss_difference_at_most": TOLERANCE,
    "loss_reached": difference("loss") <= TOLERANCE,
    "grad_norm_difference": difference("grad_norm"),
    "temp_ratio_at_compared": first["temp_mib"] / plain["temp_mib"],
  }


def define_flags() -> None:
  out = str(harness.RESULTS / "long_sequence.json")
  flags.DEFINE_string("out", out, "Where it goes.")
  flags.DEFINE_string("preset", "small", "Of engram_jax/presets.py.")
  lengths = [2048, 4096, 8192, 16384, 32768]
  number_flags.define("lengths", lengths, "Blockwise, ascending.")
  text = "Plain too, besides the first of --lengths."
  number_flags.define("plain_lengths", [4096, 8192], text)
  flags.DEFINE_integer("block_size", 512, "Of the blockwise attention.")
  flags.DEFINE_integer("loss_chunk", 1024, "Of the blockwise loss.")
  flags.DEFINE_bool("quick", False, "Short sequences: does it work?")


def main(argv: Sequence[str]) -> None:
  del argv
  args = flags.FLAGS
  if args.quick:
    harness.set_defaults(QUICK)
  lengths = args.lengths
  valid = "one or more numbers, ascending"
  ascending = lengths and sorted(set(lengths)) == lengths
  require(ascending, "lengths", lengths, valid)
  plain_lengths = [lengths[0], *args.plain_lengths]
  find_preset(args.preset)

  def child(form, length, seconds):
    line = f"{form}, {length:,} tokens"
    if seconds:
      line += f": the step may take {predicted(seconds, length):,.0f} s"
    print(f"{line} ...", file=sys.stderr, flush=True)
    answer = harness.in_child(
      f"{HERE}:measure",
      preset=args.preset,
      length=length,
      form=form,
      block_size=args.block_size,
      loss_chunk=args.loss_chunk,
    )
    if "step_s" in answer:
      seconds[length] = answer["step_s"]
    return {"form": form, "length": length, **answer}

  seconds: dict[str, dict[int, float]] = {form: {} for form in FORMS}
  by_form: dict[str, list] = {form: [] for form in FORMS}
  for form, wanted in (("plain", plain_lengths), ("blockwise", lengths)):
    for length in dict.fromkeys(wanted):
      record = child(form, length, seconds[form])
      by_form[form].append(record)
    growth(by_form[form])
  plain, blockwise = (by_form[form] for form in FORMS)
  valid = "a length at which the plain form fits, to compare with"
  require("loss" in plain[0], "lengths", lengths, valid)
  targets = verdict(blockwise, plain[0])
  columns = (
    "form length compile_s step_s state_mib temp_mib mib_per_1000 peak_mib "
    "loss grad_norm"
  ).split()
  rows = [[r.get(name) for name in columns] for r in [*plain, *blockwise]]
  result = {
    "preset": args.preset,
    "block_size": args.block_size,
    "loss_chunk": args.loss_chunk,
    "targets": targets,
    "plain": plain,
    "blockwise": blockwise,
  }
  tables = [
    f"{args.preset}: one training step on one sequence",
    harness.aligned(columns, rows),
    *(f"plain, {r['refused_by']}" for r in plain if "refused_by" in r),
    json.dumps(targets, indent=1),
  ]
  harness.publish(result, tables)


if __name__ == "__main__":
  harness.launch(define_flags, main)
