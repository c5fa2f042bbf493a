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
import statistics
import time
from collections.abc import Sequence

from engram_jax.analysis import hlo
from engram_jax.config import ModelConfig
from engram_jax.errors import require
from engram_jax.presets import preset as find_preset
from engram_jax.training.step import make_train_step
from experiments.benchmarks import harness, models

#: Names of the forms, by `scan_blocks`.
FORMS = {"scanned": True, "unrolled": False}
SECONDS = ("trace_s", "lower_s", "compile_s", "total_s")
FLAGS = {
  "preset": ("engram_27b", "Of engram_jax/presets.py."),
  "layers": ([6, 12, 30], "Numbers of blocks."),
  "batch": (8, "Sequences of a step."),
  "length": (4096, "Tokens of a sequence."),
  "limit_s": (1500, "Seconds for one compilation; it is then given up."),
  "repeats": (1, "Compilations of each."),
}


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


def compile_once(
  *, preset: str, layers: int, form: str, batch: int, length: int
) -> harness.Figures:
  """Compiles one training step; arguments as the flags, `form` of `FORMS`.

  Returns:
    Seconds of tracing, of lowering to StableHLO, of compiling, and in `total_s`
    of all three; `lowered_operations`, of the StableHLO text; `instructions`,
    of the compiled program; `temp_mib`, what it would allocate besides its
    arguments and results.
  """
  require(form in FORMS, "form", form, f"one of {', '.join(FORMS)}")
  found = find_preset(preset)
  model = with_depth(found.model, layers)
  model = dataclasses.replace(model, scan_blocks=FORMS[form], remat="block")
  setup = models.make_setup(model, found.train)
  arguments = setup.abstract_state(), models.abstract_batch(batch, length)
  step = make_train_step(setup)
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


def measure(
  *,
  preset: str,
  layers: Sequence[int],
  limit_s: int,
  repeats: int,
  **sizes: int,
) -> harness.Figures:
  """Both forms at each depth, each figure a median; arguments as the flags."""
  require(repeats >= 1, "repeats", repeats, "an integer >= 1")
  for depth in layers:
    with_depth(find_preset(preset).model, depth)  # refused now, not in an hour
  env = harness.simulated_devices(1) | {"JAX_ENABLE_COMPILATION_CACHE": "0"}
  records, ratios = [], {}
  for depth in layers:
    runs: dict[str, list] = {form: [] for form in FORMS}
    for _ in range(repeats):
      for form, done in runs.items():
        fields = dict(sizes, preset=preset, layers=depth, form=form)
        done.append(
          harness.in_child(compile_once, env=env, timeout=limit_s, **fields)
        )
    both = {}
    for form, done in runs.items():
      record = {"layers": depth, "form": form, "finished": None not in done}
      if record["finished"]:
        both[form] = {n: statistics.median(x[n] for x in done) for n in done[0]}
      records.append(record | both.get(form, {}))
    if len(both) == len(FORMS):
      scanned, unrolled = (both[form] for form in FORMS)
      names = (*SECONDS, "instructions", "peak_mib")
      ratios[str(depth)] = {n: unrolled[n] / scanned[n] for n in names}
  return {"records": records, "ratios": ratios}


def tables(result: harness.Figures) -> list[str]:
  names = ["layers", "form", "finished", *SECONDS, "lowered_operations"]
  names += ["instructions", "temp_mib", "peak_mib"]
  found = [harness.table(dict(zip(names, names)), result["records"])]
  if result["ratios"]:
    ratios = [{"blocks": n, **by} for n, by in result["ratios"].items()]
    columns = {"blocks, unrolled / scanned": "blocks"}
    columns |= {name: name for name in ratios[0] if name != "blocks"}
    found.append(harness.table(columns, ratios))
  return found


BENCHMARK = harness.Benchmark(measure, tables, FLAGS)

if __name__ == "__main__":
  harness.run(BENCHMARK)
