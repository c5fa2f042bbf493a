"""Compile time against depth: blocks in a loop, or each by itself.

  python -m experiments.benchmarks.compile_time
  python -m experiments.benchmarks.compile_time --preset=small --layers=8

The whole training step of a preset, for one CPU device, from shapes alone:
nothing is allocated and nothing runs. The two forms differ in `scan_blocks`
alone and compute the same. With another number of blocks the Engram layers sit
as the paper's do, at the second block and the middle.

Each compilation has a process of its own, without a compilation cache, and so
many seconds (--limit_s) to trace, lower and compile; the two forms take turns.
An accelerator's compiler takes other times: what is general is how they grow.
"""

import dataclasses
import itertools
import signal
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from engram_jax.analysis import hlo
from engram_jax.analysis.accounting import counting_hash
from engram_jax.config import ModelConfig
from engram_jax.errors import require
from engram_jax.memory.compression import TokenCompression
from engram_jax.presets import preset as find_preset
from engram_jax.run_config import TrainConfig
from engram_jax.training.program import Program
from engram_jax.training.runs import abstract_state
from engram_jax.training.state import abstract_model
from engram_jax.training.step import make_train_step
from experiments import number_flags
from experiments.benchmarks import harness

HERE = "experiments.benchmarks.compile_time"
#: Names of the forms, by `scan_blocks`.
FORMS = {"scanned": True, "unrolled": False}
SECONDS = ("trace_s", "lower_s", "compile_s", "total_s")


def make_program(model: ModelConfig, train: TrainConfig) -> Program:
  """The training of a model on raw token ids, on one device."""
  hashing = counting_hash(model)
  compression = hashing and TokenCompression.identity(model.vocab_size)
  graph, _, _ = abstract_model(model)
  return Program.create(
    model, train, graph, hashing=hashing, compression=compression
  )


def with_depth(model: ModelConfig, layers: int) -> ModelConfig:
  """The model with so many blocks; its memory, if any, where it fits.

  Raises:
    InputError: too few blocks for an Engram layer at the second and the middle.
  """
  memory = model.engram
  if memory is not None:
    valid = "6 or more, with a memory at the second block and the middle"
    require(layers >= 6, "layers", layers, valid)
    memory = dataclasses.replace(memory, layers=(1, layers // 2 - 1))
  return dataclasses.replace(model, num_layers=layers, engram=memory)


def abstract_batch(batch: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and dtypes of a batch [batch, length]."""
  dtypes = {
    "inputs": jnp.int32,
    "targets": jnp.int32,
    "breaks": jnp.int8,
    "loss_mask": jnp.bool_,
  }
  return {
    name: jax.ShapeDtypeStruct((batch, length), dtype)
    for name, dtype in dtypes.items()
  }


def measure(
  *, preset: str, layers: int, form: str, batch: int, length: int
) -> dict[str, Any]:
  """Compiles one training step.

  Args:
    preset: a name of `presets.PRESETS`.
    layers: blocks.
    form: one of `FORMS`.
    batch: sequences of a step.
    length: tokens of a sequence.

  Returns:
    Seconds of tracing, of lowering to StableHLO, of compiling, and in `total_s`
    of all three; `lowered_operations`, of the StableHLO text; `instructions`,
    of the compiled program; `temp_mib`, what it would allocate besides its
    arguments and results.

  Raises:
    InputError: no such preset or form, or too few blocks.
  """
  require(form in FORMS, "form", form, f"one of {', '.join(FORMS)}")
  found = find_preset(preset)
  model = with_depth(found.model, layers)
  model = dataclasses.replace(model, scan_blocks=FORMS[form], remat="block")
  program = make_program(model, found.train)
  arguments = abstract_state(program), abstract_batch(batch, length)
  step = make_train_step(program)
  times = [time.perf_counter()]
  traced = step.trace(*arguments)
  times.append(time.perf_counter())
  lowered = traced.lower()
  times.append(time.perf_counter())
  compiled = lowered.compile()
  times.append(time.perf_counter())
  taken = [end - start for start, end in itertools.pairwise(times)]
  computations = hlo.parse(compiled.as_text()).computations.values()
  temporary = compiled.memory_analysis().temp_size_in_bytes
  return {
    **dict(zip(SECONDS, [*taken, sum(taken)], strict=True)),
    "lowered_operations": lowered.as_text().count(" = "),
    "instructions": sum(map(len, computations)),
    "temp_mib": round(temporary / harness.MIB, 1),
  }


def measure_within(limit_s: int, **arguments: Any) -> dict[str, Any]:
  """`measure` in a process that ends when its time is up."""
  # Not by an exception: no Python runs while XLA compiles.
  signal.signal(signal.SIGALRM, signal.SIG_DFL)
  signal.alarm(limit_s)
  answer = measure(**arguments)
  signal.alarm(0)
  return answer


def in_time(limit_s: int, **arguments: Any) -> dict[str, Any]:
  """`measure_within` in a child, and its peak memory.

  Returns:
    What `measure` does, with `peak_mib` and `finished`: False, alone, if the
    time was not enough.
  """
  env = harness.simulated_devices(1) | {"JAX_ENABLE_COMPILATION_CACHE": "0"}
  start = time.perf_counter()
  try:
    answer = harness.in_child(
      f"{HERE}:measure_within", env=env, limit_s=limit_s, **arguments
    )
  except RuntimeError:
    if time.perf_counter() - start < limit_s:
      raise
    return {"finished": False}
  return {"finished": True, **answer}


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Of equal compilations the median of each figure."""
  if not all(run["finished"] for run in runs):
    return {"finished": False}
  names = [name for name in runs[0] if name != "finished"]
  medians = {n: statistics.median(run[n] for run in runs) for n in names}
  return {"finished": True, **medians}


def define_flags() -> None:
  harness.define_common("compile_time", repeats=1)
  flags.DEFINE_string("preset", "engram_27b", "Of engram_jax/presets.py.")
  number_flags.define("layers", [6, 12, 30], "Numbers of blocks.")
  flags.DEFINE_integer("batch", 8, "Sequences of a step.")
  flags.DEFINE_integer("length", 4096, "Tokens of a sequence.")
  text = "Seconds for one compilation; it is then given up."
  flags.DEFINE_integer("limit_s", 1500, text, lower_bound=1)


def main(argv: Sequence[str]) -> None:
  del argv
  args = flags.FLAGS
  require(args.repeats >= 1, "repeats", args.repeats, "an integer >= 1")
  model = find_preset(args.preset).model
  depths = args.layers
  for layers in depths:
    with_depth(model, layers)  # refused now, not after an hour
  records, ratios = [], {}
  for layers in depths:
    runs: dict[str, list] = {form: [] for form in FORMS}
    for _ in range(args.repeats):
      for form in FORMS:
        print(f"compiling {layers} blocks, {form} ...", file=sys.stderr)
        runs[form].append(
          in_time(
            args.limit_s,
            preset=args.preset,
            layers=layers,
            form=form,
            batch=args.batch,
            length=args.length,
          )
        )
    of_form = {form: summary(done) for form, done in runs.items()}
    records += [
      {"layers": layers, "form": form, **record}
      for form, record in of_form.items()
    ]
    if all(record["finished"] for record in of_form.values()):
      scanned, unrolled = (of_form[form] for form in FORMS)
      names = (*SECONDS, "instructions", "peak_mib")
      ratios[layers] = {name: unrolled[name] / scanned[name] for name in names}
  columns = (
    "layers form trace_s lower_s compile_s total_s lowered_operations "
    "instructions temp_mib peak_mib"
  ).split()
  rows = [[record.get(name) for name in columns] for record in records]
  tables = [
    f"{args.preset}: one training step, compiled for one CPU device",
    harness.aligned(columns, rows),
  ]
  if ratios:
    header = ["unrolled / scanned", *next(iter(ratios.values()))]
    lines = [(f"{n} blocks", *by.values()) for n, by in ratios.items()]
    tables.append(harness.aligned(header, lines))
  given_up = [
    f"{record['layers']} blocks, {record['form']}"
    for record in records
    if not record["finished"]
  ]
  if given_up:
    tables.append(f"not within {args.limit_s} s: {'; '.join(given_up)}")
  result = {
    "preset": args.preset,
    "batch": args.batch,
    "length": args.length,
    "repeats": args.repeats,
    "limit_s": args.limit_s,
    "not_within_limit": given_up,
    "records": records,
    "ratios": ratios,
  }
  harness.publish(result, tables)


if __name__ == "__main__":
  harness.launch(define_flags, main)
