"""Generation with the rows elsewhere: what it costs, and what prefetch hides.

  python -m experiments.benchmarks.offload
  python -m experiments.benchmarks.offload --quick

One model and the same prompts, with the same tokens as the outcome:

  resident          tables on the device, hashed and read by the program
  host              packed rows in host memory, read before each step
  host, prefetch    the same on a thread: a prompt's rows while the prompts
                    before are computed; a new token's, while the blocks below
                    the first Engram layer are
  pinned            packed rows in pinned host memory, gathered there by a
                    program, where the platform does that
  pinned, prefetch
  file              a row file, all of it in the page cache
  file, prefetch

They take turns, token by token when decoding. A table's values are those that
the packed rows stand for, so that all must draw the same tokens: the program
ends with an error if not.

Then a host store made slower (`SlowStore`), with and without prefetch: up to
which latency the prefetch hides it. `fetch_ms` is one fetch alone, `below_ms`
the blocks below the first Engram layer alone: in decoding no more than that can
be hidden, for the token to come decides what is read (with --layers the memory
is elsewhere). `hidden` is

  1 - (time of a step - time of a resident step) / fetch_ms

With --gib the memory is as large as that; with --packed the resident one is
packed too. On a machine without an accelerator the thread and the model share
the cores.
"""

import contextlib
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from engram_jax.analysis.plots import plot_lines
from engram_jax.errors import InputError
from engram_jax.memory.quantization import RowFormat
from engram_jax.memory.stores import (
  FileStore,
  HostStore,
  PinnedStore,
  SlowStore,
)
from experiments import number_flags
from experiments.benchmarks import harness
from experiments.benchmarks.offload_runs import (
  Subject,
  bytes_per_token,
  decoder_of,
  in_turns,
  make_rows,
  pieces,
  resident_decoder,
  subject_of,
  write_rows,
)

RUNS = "experiments.benchmarks.offload_runs"
#: What the name of a case ends with whose rows a thread reads.
PREFETCH = ", prefetch"
#: Flags that say what is asked.
PROMPTS = ("prompts", "shortest", "longest", "batch", "new_tokens")
#: Share of the resident throughput that is to be reached with prefetch.
TARGETS = {"host": 0.97, "file": 0.95}
#: What the flags are with --quick, where they are not given.
QUICK = {
  "preset": "tiny",
  "row_format": "int8",
  "prompts": 4,
  "longest": 40,
  "shortest": 10,
  "batch": 2,
  "new_tokens": 4,
  "repeats": 1,
  "delays_ms": [0, 20],
}


# --- the figures ---


def hidden(
  case: Mapping[str, float],
  resident: Mapping[str, float],
  phase: str,
  fetch_ms: float,
) -> float:
  """Share of a fetch that did not make a step longer; may leave 0..1."""
  more = case[f"{phase}_ms"] - resident[f"{phase}_ms"]
  return 1 - more / fetch_ms


def measure(
  subject: Subject,
  packed: Mapping[int, np.ndarray],
  row_format: RowFormat,
  folder: pathlib.Path,
  *,
  repeats: int,
  delays_ms: Sequence[float],
  as_packed: bool = False,
) -> dict[str, Any]:
  """All homes in turns, and the curve over a store's latency."""
  resident = resident_decoder(subject, packed, row_format, as_packed=as_packed)
  host = HostStore(packed, row_format)
  stores, left_out = {"host": host}, {}
  try:
    stores["pinned"] = PinnedStore(packed, row_format)
  except InputError as error:
    left_out["pinned"] = str(error)
  file = write_rows(folder / "rows", packed, subject.hashing, row_format)
  stores["file"] = FileStore(file)
  alone = pieces(subject, stores, repeats=repeats)
  with contextlib.ExitStack() as stack:

    def of(store, prefetch):
      return stack.enter_context(decoder_of(subject, store, prefetch=prefetch))

    # Case: the store, the home whose fetch it is, what is added to that.
    cases = {name: (store, name, 0.0) for name, store in stores.items()}
    for delay in delays_ms:
      slow = SlowStore(host, delay_s=delay / 1e3)
      cases[f"{delay:g} ms"] = slow, "host", delay
    decoders = {"resident": resident}
    for name, (store, _, _) in cases.items():
      decoders[name] = of(store, False)
      decoders[name + PREFETCH] = of(store, True)
    found = in_turns(subject, decoders, repeats=repeats)
  for phase in ("prefill", "decode"):
    base = found["resident"]
    for case in found.values():
      case[f"{phase}_ratio"] = case[phase] / base[phase]
    for name, (_, home, delay) in cases.items():
      case = found[name + PREFETCH]
      fetch = alone[phase]["fetch_ms"][home] + delay
      case[f"{phase}_hidden"] = hidden(case, base, phase, fetch)
  curve = []
  for delay in delays_ms:
    name = f"{delay:g} ms"
    without, with_ = found.pop(name), found.pop(name + PREFETCH)
    point = {"delay_ms": delay}
    for phase in ("prefill", "decode"):
      point[phase] = {
        "without": without[f"{phase}_ratio"],
        "with": with_[f"{phase}_ratio"],
        "hidden": with_[f"{phase}_hidden"],
      }
    curve.append(point)
  verdict = {
    f"{name}, {phase}": {
      "ratio": found[name + PREFETCH][f"{phase}_ratio"],
      "at_least": target,
      "reached": found[name + PREFETCH][f"{phase}_ratio"] >= target,
    }
    for name, target in TARGETS.items()
    for phase in ("prefill", "decode")
  }
  return {
    "cases": found,
    "left_out": left_out,
    "alone": alone,
    "per_token": bytes_per_token(subject, host),
    "latency": curve,
    "targets": verdict,
  }


# --- the program ---


def define_flags() -> None:
  harness.define_common("offload", repeats=5)
  flags.DEFINE_string("preset", "small", "Of engram_jax/presets.py.")
  text = "Where the memory is instead of the preset's layers."
  number_flags.define("layers", [], text)
  flags.DEFINE_string("row_format", "fp8", "Of the packed rows.")
  text = "Of packed rows; 0 for as many rows as the preset has."
  flags.DEFINE_float("gib", 0.0, text, lower_bound=0.0)
  text = "Resident rows are packed ones, not float32 tables."
  flags.DEFINE_bool("packed", False, text)
  flags.DEFINE_integer("prompts", 32, "How many; a multiple of --batch.")
  flags.DEFINE_integer("shortest", 13, "Tokens; lengths are uniform.")
  flags.DEFINE_integer("longest", 128, "Tokens.")
  flags.DEFINE_integer("batch", 8, "Prompts at a time.")
  flags.DEFINE_integer("new_tokens", 32, "After the last batch of prompts.")
  delays = [2, 5, 10, 20, 50]
  text = "Of the store made slower."
  number_flags.define("delays_ms", delays, text, kind=float)
  flags.DEFINE_bool("quick", False, "Small and short: does it work?")


def tables_of(result: Mapping[str, Any]) -> list[str]:
  """The figures for the terminal."""
  header = (
    "rows in",
    "prefill tokens/s",
    "of resident",
    "hidden",
    "decode tokens/s",
    "of resident",
    "hidden",
    "resident set, MiB",
    "of files",
  )
  rows = []
  for name, case in result["cases"].items():
    memory = result["memory"].get(name.split(",")[0], {})
    if name in TARGETS:  # measured with prefetch
      memory = {}
    row = [name]
    for phase in ("prefill", "decode"):
      row += [case[phase], case[f"{phase}_ratio"], case.get(f"{phase}_hidden")]
    row += [memory.get("anonymous_mib"), memory.get("mapped_mib")]
    rows.append(row)
  header_curve = (
    "latency, ms",
    "prefill without",
    "with prefetch",
    "hidden",
    "decode without",
    "with prefetch",
    "hidden",
  )
  curve = [
    [point["delay_ms"]]
    + [
      point[phase][key]
      for phase in ("prefill", "decode")
      for key in ("without", "with", "hidden")
    ]
    for point in result["latency"]
  ]
  lines = []
  for phase, figures in result["alone"].items():
    fetches = ", ".join(
      f"{name} {ms:.3g}" for name, ms in figures["fetch_ms"].items()
    )
    each = result["per_token"][phase]
    lines.append(
      f"{phase}: a fetch alone takes {fetches} ms, the blocks below the memory "
      f"{figures['below_ms']:.3g} ms; {each['rows_asked']:.0f} rows asked, "
      f"{each['rows_read']:.1f} read, {each['bytes_read']:.0f} bytes per token"
    )
  return [
    harness.aligned(header, rows),
    "\n".join(lines),
    "a slower store, of resident\n" + harness.aligned(header_curve, curve),
    "\n".join(
      f"{name}: {x['ratio']:.3f} of resident, aim {x['at_least']}: "
      + ("reached" if x["reached"] else "missed")
      for name, x in result["targets"].items()
    ),
  ]


def plot(result: Mapping[str, Any], path: pathlib.Path) -> None:
  """Throughput against the store's latency."""
  points = result["latency"]
  delays = [point["delay_ms"] for point in points]
  lines = {
    f"{phase}, {text}": (delays, [100 * point[phase][key] for point in points])
    for phase in ("prefill", "decode")
    for key, text in (("with", "prefetch"), ("without", "no prefetch"))
  }
  plot_lines(
    lines,
    path,
    title="Rows from a slow store",
    xlabel="latency of the store (ms)",
    ylabel="throughput (% of resident)",
  )


def main(argv: Sequence[str]) -> None:
  del argv
  args = flags.FLAGS
  if args.quick:
    harness.set_defaults(QUICK)
  names = ("preset", "layers", "row_format", "gib", *PROMPTS)
  fields = {name: getattr(args, name) for name in names}
  child = dict(as_packed=args.packed, **fields)
  memory = {
    home: harness.in_child(f"{RUNS}:resident_set", home=home, **child)
    for home in ("resident", "host", "file")
  }
  subject, row_format = subject_of(**fields)
  packed = make_rows(subject.hashing.num_rows, row_format)
  with tempfile.TemporaryDirectory() as folder:
    result = measure(
      subject,
      packed,
      row_format,
      pathlib.Path(folder),
      repeats=args.repeats,
      delays_ms=args.delays_ms,
      as_packed=args.packed,
    )
  result = {**child, "repeats": args.repeats, "memory": memory, **result}
  harness.publish(result, tables_of(result))
  plot(result, pathlib.Path(args.out).with_suffix(".png"))


if __name__ == "__main__":
  harness.launch(define_flags, main)
