"""Where the time of one compiled step goes: by part of the library, by kind.

JAX's profiler says which operation of the program ran when; the program's text
says which lines of the library an operation comes from. A fusion belongs where
its result does. Milliseconds are of the wall clock: an operation is charged
from its start to the start of the next one, for XLA's threads end later than
the call that starts them.
"""

import collections
import pathlib
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax

from engram_jax.analysis import estimates, hlo
from experiments.benchmarks import harness


class Run(Protocol):
  """A program to be profiled: a call is one step.

  Attributes:
    compiled: the step.
  """

  compiled: jax.stages.Compiled

  def __call__(self) -> Any: ...


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
