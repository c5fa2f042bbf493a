"""What the benchmarks share: clocks, processes, memory, tables of figures.

Two rules make figures of a shared machine comparable:
  - contenders take turns in one process (A B A B), so that a disturbance hits
    both, and the median is quoted, the minimum beside it;
  - peak memory is read in a process that did nothing else.

`python -m experiments.benchmarks.harness MODULE:FUNCTION JSON` is the child's
side of `in_child`.
"""

import importlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import flags

from engram_jax.errors import InputError, require

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "experiments/results"
MIB = 2**20
GIB = 2**30
#: Left to the rest of the machine by `require_memory`.
RESERVE = 2 * GIB

# --- time ---


def interleaved(
  cases: Mapping[str, Callable[[], Any]], *, repeats: int, warmup: int = 2
) -> dict[str, dict[str, float]]:
  """Times functions in turns: A B C A B C ...

  Args:
    cases: by name; what a function returns is waited for. What it needs is
      made before, so that a call is what is to be measured and no more.
    repeats: timed calls of each.
    warmup: calls of each before, with the compilation in the first.

  Returns:
    Per case `median_ms`, `min_ms` and `first_s`, the first call of all.

  Raises:
    InputError: nothing to measure.
  """
  require(repeats >= 1, "repeats", repeats, "an integer >= 1")
  require(warmup >= 1, "warmup", warmup, "an integer >= 1: it compiles")

  def seconds(function):
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start

  first = {name: seconds(function) for name, function in cases.items()}
  for _ in range(warmup - 1):
    for function in cases.values():
      seconds(function)
  taken = {name: [] for name in cases}
  for _ in range(repeats):
    for name, function in cases.items():
      taken[name].append(seconds(function))
  return {
    name: {
      "median_ms": 1e3 * statistics.median(times),
      "min_ms": 1e3 * min(times),
      "first_s": first[name],
    }
    for name, times in taken.items()
  }


# --- memory ---


def peak_memory() -> int:
  """Largest resident set of this process so far, in bytes."""
  # Not ru_maxrss where it can be helped: a child inherits its parent's.
  kib = _proc("/proc/self/status", "VmHWM")
  if kib is None:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
  return 1024 * kib


def resident_memory() -> dict[str, float]:
  """What this process holds now: `anonymous_mib`, and of files `mapped_mib`.

  Pages of files are the system's to take back. NaN without /proc.
  """
  kib = {
    name: _proc("/proc/self/status", field)
    for name, field in (("anonymous_mib", "RssAnon"), ("mapped_mib", "RssFile"))
  }
  return {k: float("nan") if x is None else x / 1024 for k, x in kib.items()}


def require_memory(field: str, value: Any, needed: int) -> None:
  """Refuses what would not fit beside what else the machine does.

  Args:
    field: the flag that decides how much is needed.
    value: what it holds.
    needed: bytes.

  Raises:
    InputError: fewer than `needed` + `RESERVE` bytes are free.
  """
  kib = _proc("/proc/meminfo", "MemAvailable")
  if kib is None:  # no way to know on this system
    return
  free = 1024 * kib
  valid = (
    f"what fits in {free / GIB:.1f} GiB of free memory; this needs "
    f"{needed / GIB:.1f} GiB and leaves {RESERVE / GIB:.0f} GiB to others"
  )
  require(needed + RESERVE <= free, field, value, valid)


def resident(tree: Any) -> Any:
  """The same arrays, moved by 0.001 in place, so that every page is real.

  Fresh zeros may be pages that exist on paper only: they would cost no memory,
  and each first touch a page fault, which a run of some length never sees. The
  arrays given are donated, and lie as they did.
  """

  def touched(x):
    floating = jax.numpy.issubdtype(x.dtype, jax.numpy.floating)
    return x + 1e-3 if floating else x

  shardings = jax.tree.map(lambda x: x.sharding, tree)
  function = lambda t: jax.tree.map(touched, t)
  return jax.jit(function, donate_argnums=0, out_shardings=shardings)(tree)


def _proc(file: str, name: str) -> int | None:
  """The KiB that a file of /proc gives for `name`; None without /proc."""
  try:
    lines = pathlib.Path(file).read_text().splitlines()
  except OSError:
    return None
  return next((int(x.split()[1]) for x in lines if x.startswith(name)), None)


# --- processes ---


def simulated_devices(count: int) -> dict[str, str]:
  """Environment of a child with so many CPU devices: see `in_child`.

  JAX fixes their number when it starts. They share the machine's cores.
  """
  require(count >= 1, "devices", count, "an integer >= 1")
  name = "--xla_force_host_platform_device_count"
  others = os.environ.get("XLA_FLAGS", "").split()
  others = [flag for flag in others if not flag.startswith(name)]
  xla_flags = " ".join([*others, f"{name}={count}"])
  return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags}


def in_child(
  function: str, *, env: Mapping[str, str] | None = None, **arguments: Any
) -> dict[str, Any]:
  """Calls a function in a process of its own.

  Args:
    function: "module:name"; it returns a dict that JSON can hold.
    env: what its environment has besides this one's.
    **arguments: its keyword arguments, which JSON can hold too.

  Returns:
    The function's dict, and `peak_mib`, the child's `peak_memory`.

  Raises:
    InputError: as in the child.
    RuntimeError: the child failed otherwise; with its last words.
  """
  module = "experiments.benchmarks.harness"
  done = subprocess.run(
    [sys.executable, "-m", module, function, json.dumps(arguments)],
    cwd=ROOT,
    env=os.environ | dict(env or {}),
    capture_output=True,
    text=True,
  )
  if done.returncode:
    words = done.stderr.strip()[-2000:] or f"exit status {done.returncode}"
    raise RuntimeError(f"{function}({arguments}) failed:\n{words}")
  answer = json.loads(done.stdout.splitlines()[-1])
  if "refused" in answer:
    raise InputError(*answer["refused"])
  return answer


def _child(argv: Sequence[str]) -> None:
  module, _, name = argv[1].partition(":")
  function = getattr(importlib.import_module(module), name)
  try:
    answer = function(**json.loads(argv[2]))
    answer = {**answer, "peak_mib": round(peak_memory() / MIB, 1)}
  except InputError as error:
    answer = {"refused": [error.field, str(error.value), error.valid]}
  print(json.dumps(answer))


# --- reports ---


def aligned(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """A table for the terminal; numbers to the right, three digits or more."""

  def text(value):
    if value is None:
      return "-"
    if isinstance(value, float):
      return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if type(value) is int else str(value)

  cells = [list(header)] + [[text(value) for value in row] for row in rows]
  widths = [max(map(len, column)) for column in zip(*cells)]
  lines = [
    "  ".join(
      f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}"
      for i, (cell, width) in enumerate(zip(line, widths))
    ).rstrip()
    for line in cells
  ]
  return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def launch(
  define_flags: Callable[[], None], main: Callable[[Sequence[str]], Any]
) -> None:
  """Runs a benchmark as a program."""
  # Here, not at the top: training, data and checkpoints come with it, and a
  # child would count them in its peak memory.
  from experiments import cli

  define_flags()
  cli.run(main)


def set_defaults(values: Mapping[str, Any]) -> None:
  """Gives other values to the flags that were not given."""
  for name, value in values.items():
    flags.FLAGS.set_default(name, value)


def define_common(name: str, *, repeats: int) -> None:
  """The flags that every benchmark has."""
  flags.DEFINE_integer("repeats", repeats, "Timed calls of each contender.")
  flags.DEFINE_string("out", str(RESULTS / f"{name}.json"), "Where it goes.")


def publish(result: dict[str, Any], tables: Sequence[str]) -> None:
  """Prints the tables, and writes the JSON file that `--out` names."""
  from experiments.results import write_result  # see `launch`

  load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
  write_result(flags.FLAGS.out, {"load_average": load, **result})
  print("\n\n".join([*tables, f"written to {flags.FLAGS.out}"]))


if __name__ == "__main__":
  _child(sys.argv)
