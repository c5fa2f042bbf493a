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
library that it comes from and by kind. A fusion belongs where its result does.
The profile's milliseconds are of the wall clock: an operation is charged from
its start to the start of the next one, for XLA's threads end later than the
call that starts them.
"""

import collections
import dataclasses
import itertools
import pathlib
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import flags

from engram_jax.analysis import estimates, hlo
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


# --- the profile ---

#: Part of the library by file and, where given, function; the first that fits.
_PARTS = (
  ("backbone/routing.py", "", "routing"),
  ("backbone/dispatch.py", "apply_experts", "experts"),
  ("backbone/dispatch.py", "dispatch_dropless", "experts"),
  ("backbone/dispatch.py", "_combine", "combine"),
  ("backbone/dispatch.py", "from_buckets", "combine"),
  ("backbone/dispatch.py", "", "dispatch"),
  ("backbone/moe.py", "", "experts' sum"),
  ("backbone/hyper_connections.py", "", "hyper-connections"),
  ("backbone/attention.py", "", "attention"),
  ("backbone/blockwise_attention.py", "", "attention"),
  ("backbone/layers.py", "swiglu", "dense feed-forward"),
  ("backbone/layers.py", "SwiGLU", "dense feed-forward"),
  ("backbone/layers.py", "RMSNorm", "norms"),
  ("backbone/layers.py", "Embedding", "embedding"),
  ("backbone/layers.py", "logits_of", "loss"),
  ("norms.py", "", "norms"),
  ("training/losses.py", "", "loss"),
  ("training/step.py", "_train_step.<locals>.apply", "optimizer"),
  ("training/step.py", "_train_step", "gradient norm"),
  ("memory/", "", "memory"),
  ("fusion/", "", "memory"),
  ("backbone/transformer.py", "", "blocks"),
)
#: Of what a fusion has inside, the first names its kind.
_KINDS = (
  "dot convolution custom-call sort scatter gather dynamic-update-slice "
  "dynamic-slice reduce-window reduce"
).split()
_CONTAINERS = ("while", "conditional", "call")
_FRAME_ID = re.compile(r"\bstack_frame_id=(\d+)")
_CALLS = re.compile(r"\bcalls=%?([\w.\-]+)")
_FIELDS = re.compile(r"(\w+_id)=(\d+)")
_TARGET = re.compile(r'\bcustom_call_target="([^"]*)"')


def stack_frames(text: str) -> dict[int, list[tuple[str, str]]]:
  """Per stack frame of a program's text, (file, function) from the inside out.

  XLA writes the tables `FileNames`, `FunctionNames`, `FileLocations` and
  `StackFrames` before the computations; operations name a frame.
  """
  tables: dict[str, dict[int, Any]] = collections.defaultdict(dict)
  table = ""
  for line in text.splitlines():
    if line.startswith("%") or line.startswith("ENTRY"):
      break
    number, _, rest = line.partition(" ")
    if number.isdigit():
      fields = {name: int(value) for name, value in _FIELDS.findall(rest)}
      tables[table][int(number)] = fields or rest.strip('"')
    elif line:
      table = line
  frames = tables["StackFrames"]
  # A frame is its own parent nowhere: where one seems to be, 1 stands for none.
  shift = any(frame["parent_frame_id"] == n for n, frame in frames.items())
  found: dict[int, list[tuple[str, str]]] = {}
  for number, frame in sorted(frames.items()):
    place = tables["FileLocations"][frame["file_location_id"]]
    here = (
      tables["FileNames"][place["file_name_id"]],
      tables["FunctionNames"][place["function_name_id"]],
    )
    outer = found.get(frame["parent_frame_id"] - shift, [])
    found[number] = [here, *outer]
  return found


def part_of(frames: Sequence[tuple[str, str]]) -> str:
  """The part of the library that an operation of this stack belongs to."""
  for file, function in frames:
    for name, start, part in _PARTS:
      if f"/engram_jax/{name}" in file and function.startswith(start):
        within = any(f.endswith("/backbone/moe.py") for f, _ in frames)
        shared = part == "dense feed-forward" and within
        return "shared experts" if shared else part
  return "other"


def kind_of(instruction: hlo.Instruction, program: hlo.Program) -> str:
  """What an operation does; of a fusion, the heaviest thing inside."""
  if instruction.opcode == "custom-call":
    return (_TARGET.findall(instruction.attributes) or ["custom-call"])[0]
  if instruction.opcode != "fusion":
    known = instruction.opcode in (*_KINDS, "copy", "transpose")
    return instruction.opcode if known else "elementwise"
  inside = {
    each.opcode
    for name in _CALLS.findall(instruction.attributes)
    for each in program.computations[name].values()
  }
  return next((kind for kind in _KINDS if kind in inside), "elementwise")


def durations(call: Callable[[], Any], known: set[str]) -> dict[str, float]:
  """Milliseconds of the wall clock per operation of one call.

  Args:
    call: runs a compiled program.
    known: names of its operations, those aside that only hold others.
  """
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0  # it takes time itself
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder, profiler_options=options):
      jax.block_until_ready(call())
    (file,) = pathlib.Path(folder).glob("**/*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(file))
    with warnings.catch_warnings():
      # Of a class that nanobind makes here on Python 3.12; where warnings are
      # errors, it would end the process.
      warnings.simplefilter("ignore", DeprecationWarning)
      events = [
        (event.start_ns, event.end_ns, name)
        for plane in data.planes
        for line in plane.lines
        for event in line.events
        if (name := dict(event.stats).get("hlo_op")) in known
      ]
  events.sort()
  taken: dict[str, float] = collections.defaultdict(float)
  ends = [start for start, _, _ in events[1:]] + [e for _, e, _ in events[-1:]]
  for (start, _, name), end in zip(events, ends, strict=True):
    taken[name] += (end - start) / 1e6
  return dict(taken)


def profile(run: Run, *, listed: int = 12) -> dict[str, Any]:
  """Where the time of one step goes.

  Args:
    run: whose next step is profiled.
    listed: operations named one by one.

  Returns:
    `step_ms`, their sum; `parts` and `kinds`, each by name from the largest:
    `ms`, `share`, and for parts `gflops` and `kinds` (ms); `operations`, the
    largest, each with `part`, `kind`, `times`, `ms`, `gflops` and `op_name`.
  """
  text = run.compiled.as_text()
  work = estimates.work(text)
  frames, program = stack_frames(text), work.program
  instructions = {
    name: instruction
    for computation in program.computations.values()
    for name, instruction in computation.items()
    if instruction.opcode not in _CONTAINERS
  }
  costs = {operation.name: operation for operation in work.operations}
  operations = []
  for name, ms in durations(run, set(instructions)).items():
    instruction, cost = instructions[name], costs.get(name)
    frame = _FRAME_ID.search(instruction.attributes)
    stack = frames.get(int(frame.group(1)), []) if frame else []
    operations.append(
      {
        "operation": name,
        "part": part_of(stack),
        "kind": kind_of(instruction, program),
        "times": cost.times if cost else 1,
        "ms": ms,
        "gflops": cost.times * cost.flops / 1e9 if cost else 0.0,
        "op_name": cost.op_name if cost else "",
      }
    )
  operations.sort(key=lambda operation: -operation["ms"])
  total = sum(operation["ms"] for operation in operations)

  def sums(by, **of):
    """`ms` by name, the largest first, of the operations like `of`."""
    found = collections.Counter()
    for operation in operations:
      if of.items() <= operation.items():
        found[operation[by]] += operation["ms"]
    return dict(found.most_common())

  flops = collections.Counter()
  for operation in operations:
    flops[operation["part"]] += operation["gflops"]
  parts, kinds = (
    {name: {"ms": ms, "share": ms / total} for name, ms in sums(by).items()}
    for by in ("part", "kind")
  )
  for name, part in parts.items():
    part |= {"gflops": flops[name], "kinds": sums("kind", part=name)}
  return {
    "step_ms": total,
    "parts": parts,
    "kinds": kinds,
    "operations": operations[:listed],
  }


# --- the report ---


def profile_tables(profiles: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """Milliseconds of one step by part and by kind, one column per model."""
  tables = []
  for field in ("parts", "kinds"):
    names = dict.fromkeys(n for p in profiles.values() for n in p[field])
    rows = [
      (
        name,
        *(p[field].get(name, {}).get("ms") for p in profiles.values()),
      )
      for name in names
    ]
    rows.append(("all", *(p["step_ms"] for p in profiles.values())))
    header = [field, *(f"{name}, ms" for name in profiles)]
    tables.append(harness.aligned(header, rows))
  return tables


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
