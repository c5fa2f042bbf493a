"""What makes a benchmark of a function: flags, turns, children, tables, JSON.

A benchmark says its cases, its columns and its flags:

  BENCHMARK = harness.Benchmark(measure, tables, flags={"rows": (100, "...")})
  if __name__ == "__main__":
    harness.run(BENCHMARK)

`measure` takes every flag as a keyword and returns what JSON can hold; `tables`
makes text of it; `picture` draws it. The JSON file says the command, the flags,
the seed, the machine, the versions and the commit too.

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
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from engram_jax.errors import InputError, require

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "experiments/results"
MIB = 2**20
GIB = 2**30
#: Left to the rest of the machine by `require_memory`.
RESERVE = 2 * GIB
#: Of everything that is drawn.
SEED = 0

Figures = dict[str, Any]


class Picture(NamedTuple):
  """Lines of percentages over one of a result's lists.

  Attributes:
    points: path of the list in the result.
    x: path of x in a point.
    lines: path of a share in a point, by name of its line.
    title: over the picture.
    xlabel: with its unit.
    ylabel: with its unit.
    log_x: logarithmic x axis; points with x = 0 are left out.
  """

  points: str
  x: str
  lines: Mapping[str, str]
  title: str
  xlabel: str
  ylabel: str
  log_x: bool = False


class Benchmark(NamedTuple):
  """A benchmark as `run` takes it.

  Attributes:
    measure: function of the flags as keywords.
    tables: texts to print of its result.
    flags: default and help by name; the default decides the type.
    picture: lines drawn of the result into a `.png` beside the JSON.
    required: flags that have to be given.
    configured: there is a flag `--config=FILE.py`; `measure` gets the config
      as `configured`, None if it is not given.
  """

  measure: Callable[..., Figures]
  tables: Callable[[Figures], Iterable[str]]
  flags: Mapping[str, tuple[Any, str]]
  picture: Picture | None = None
  required: Sequence[str] = ()
  configured: bool = False


def run(benchmark: Benchmark) -> None:
  """Runs a benchmark as a program."""
  # Here, not at the top: training, data and checkpoints come with them, and a
  # child would count them in its peak memory.
  from experiments import cli, results

  name = sys.modules["__main__"].__spec__.name.rpartition(".")[2]
  _define(benchmark.flags)
  file = cli.define_config() if benchmark.configured else None
  flags.DEFINE_string("out", str(RESULTS / f"{name}.json"), "Where it goes.")
  flags.mark_flags_as_required(benchmark.required)

  def main(argv: Sequence[str]) -> None:
    del argv
    out = flags.FLAGS.out
    results.require_place(out)  # before the work, not after it
    config = {
      name: _value(name, default)
      for name, (default, _) in benchmark.flags.items()
    }
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    about = {"config": config, "seed": SEED, "load_average": load}
    more = {} if file is None else {"configured": file.value}
    result = {**about, **benchmark.measure(**config, **more)}
    results.write_result(out, result)
    if benchmark.picture:
      draw(benchmark.picture, result, out)
    texts = [*benchmark.tables(result), *verdict(result.get("targets", {}))]
    print("\n\n".join([*texts, f"written to {out}"]))

  cli.run(main)


def _define(defaults: Mapping[str, tuple[Any, str]]) -> None:
  for name, (default, text) in defaults.items():
    match default:
      case bool():
        flags.DEFINE_bool(name, default, text)
      case int():
        flags.DEFINE_integer(name, default, text, lower_bound=0)
      case float():
        flags.DEFINE_float(name, default, text, lower_bound=0.0)
      case list():
        words = list(map(str, default))
        flags.DEFINE_multi_string(name, words, f"{text} Commas, or again.")
      case _:
        flags.DEFINE_string(name, default, text)


def _value(name: str, default: Any) -> Any:
  """A flag's; the words of a list are of the kind of those in its default.

  Raises:
    InputError: a word that is no number where one is asked for.
  """
  value = flags.FLAGS[name].value
  if not isinstance(default, list):
    return value
  words = [word for words in value for word in words.split(",") if word]
  kind = type(default[0]) if default else int
  try:
    return [kind(word) for word in words]
  except ValueError:
    valid = "integers" if kind is int else "numbers"
    valid += " separated by commas"
    raise InputError(name, ",".join(words), valid) from None


# --- time ---


def interleaved(
  cases: Mapping[Any, Callable[[], Any]], *, repeats: int, warmup: int = 2
) -> dict[Any, dict[str, float]]:
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
  first = {name: seconds(function) for name, function in cases.items()}
  for _ in range(warmup - 1):
    for function in cases.values():
      seconds(function)
  taken = {name: [] for name in cases}
  for _ in range(repeats):
    for name, function in cases.items():
      taken[name].append(seconds(function))
  return {
    name: {**spread(times), "first_s": first[name]}
    for name, times in taken.items()
  }


def seconds(function: Callable[[], Any]) -> float:
  """What a call takes until its result is there."""
  start = time.perf_counter()
  jax.block_until_ready(function())
  return time.perf_counter() - start


def spread(times: Sequence[float]) -> dict[str, float]:
  """`median_ms` and `min_ms` of seconds."""
  return {
    "median_ms": 1e3 * statistics.median(times),
    "min_ms": 1e3 * min(times),
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


def resident_memory() -> dict[str, float | None]:
  """What this process holds now: `anonymous_mib`, and of files `mapped_mib`.

  Pages of files are the system's to take back. None without /proc.
  """
  fields = {"anonymous_mib": "RssAnon", "mapped_mib": "RssFile"}
  kib = {k: _proc("/proc/self/status", x) for k, x in fields.items()}
  return {k: None if x is None else x / 1024 for k, x in kib.items()}


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
  function: Callable[..., Figures],
  *,
  env: Mapping[str, str] | None = None,
  **arguments: Any,
) -> Figures:
  """Calls a function in a process of its own.

  Args:
    function: a function at a module's top level; it returns a dict that JSON
      can hold.
    env: what its environment has besides this one's.
    **arguments: its keyword arguments, which JSON can hold too.

  Returns:
    The function's dict, and `peak_mib`, the child's `peak_memory`.

  Raises:
    InputError: as in the child.
    RuntimeError: the child failed otherwise; with its last words.
  """
  module = function.__module__
  if module == "__main__":
    module = sys.modules[module].__spec__.name
  name = f"{module}:{function.__qualname__}"
  # The whole may take minutes: somebody may be looking.
  what = ", ".join(f"{k} {v}" for k, v in arguments.items())
  print(f"{function.__qualname__}: {what} ...", file=sys.stderr, flush=True)
  done = subprocess.run(
    [sys.executable, "-m", __spec__.name, name, json.dumps(arguments)],
    cwd=ROOT,
    env=os.environ | dict(env or {}),
    capture_output=True,
    text=True,
  )
  if done.returncode:
    words = done.stderr.strip()[-2000:] or f"exit status {done.returncode}"
    raise RuntimeError(f"{name}({arguments}) failed:\n{words}")
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


def target(
  value: float, *, at_most: float | None = None, at_least: float | None = None
) -> Figures:
  """A figure, its bound, and whether it is `reached`."""
  if at_most is not None:
    return {"value": value, "at_most": at_most, "reached": value <= at_most}
  return {"value": value, "at_least": at_least, "reached": value >= at_least}


def verdict(targets: Mapping[str, Figures]) -> list[str]:
  """A text with a line for each of `target`'s figures; none without any."""
  lines = []
  for name, (value, bound, reached) in (
    (name, one.values()) for name, one in targets.items()
  ):
    sort = "at most" if "at_most" in targets[name] else "at least"
    end = "reached" if reached else "MISSED"
    lines.append(f"{name}: {value:.4g}, to be {sort} {bound:.4g}: {end}")
  return ["\n".join(lines)] if lines else []


def table(
  columns: Mapping[str, Any] | Sequence[str],
  records: Iterable[Mapping[str, Any]],
  *,
  title: str = "",
) -> str:
  """A table for the terminal of a column per header and a line per record.

  Args:
    columns: by header a path of keys into a record ("decode.ratio"), or a
      function of it; or the names of keys, which are their own headers.
    records: a value that one does not have is "-".
    title: a line above.
  """

  def value(record, column):
    return column(record) if callable(column) else at(record, column)

  if not isinstance(columns, Mapping):
    columns = dict(zip(columns, columns))
  rows = [[value(r, column) for column in columns.values()] for r in records]
  return "\n".join([*([title] if title else []), aligned(list(columns), rows)])


def at(record: Any, path: str) -> Any:
  """What lies at a path of keys ("decode.ratio"); None if nothing does."""
  for key in path.split("."):
    record = record.get(key) if record else None
  return record


def scaled(path: str, unit: float) -> Callable[[Any], float | None]:
  """A column of a number at a path, in such units."""
  return lambda r: None if at(r, path) is None else at(r, path) / unit


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


def draw(picture: Picture, result: Figures, out: str | pathlib.Path) -> None:
  """Draws a picture of a result beside its JSON file, `out`."""
  from engram_jax.analysis.plots import plot_lines

  points = at(result, picture.points)
  if picture.log_x:
    points = [point for point in points if at(point, picture.x)]
  xs = [at(point, picture.x) for point in points]
  lines = {
    name: (xs, [100 * at(point, path) for point in points])
    for name, path in picture.lines.items()
  }
  names = ("title", "xlabel", "ylabel", "log_x")
  labels = {name: getattr(picture, name) for name in names}
  plot_lines(lines, pathlib.Path(out).with_suffix(".png"), **labels)


def rng(stream: int = 0) -> np.random.Generator:
  """NumPy's generator; every stream of numbers is another."""
  return np.random.default_rng([SEED, stream])


if __name__ == "__main__":
  _child(sys.argv)
