"""Rows fetched from all devices: time, bytes, and what duplicates save.

  python -m experiments.benchmarks.sharded_lookup
  python -m experiments.benchmarks.sharded_lookup --only=text

`lookup`, on simulated CPU devices, each number of them in a process of its own:

  exchange        `memory.exchange` with the room that training starts with
                  (`mesh.lookup_capacity`), or what its batch then needs
  exchange, full  with room for any batch
  gather          `memory.exchange` for few ids
  plain           table[ids] jitted with shardings, which XLA partitions; its
                  gradient, of the whole table, pinned to where the table lies

The first three end with each row's gradient, summed, at its owner; the last one
with a dense gradient, which costs more the larger the table. All are compared:
the same rows, the same sums.

Bytes are those that a device sends, read from the compiled program, next to the
least that is possible: each distinct row of a device that lives elsewhere,
once, and its gradient once. The rest is padding, duplicates and ids.

`text` is why duplicates are dropped: distinct rows over ids of one device's
batch of real text, by n-gram order.
"""

import json
import math
import os
import pathlib
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import flags

from engram_jax.errors import require
from engram_jax.run_config import DataConfig
from experiments import number_flags
from experiments.benchmarks import harness
from experiments.benchmarks.lookup_runs import STRATEGIES, WHAT

PARTS = ("lookup", "text")
NOTE = (
  "Simulated devices are threads that share this machine's cores and memory: "
  "work that a mesh does side by side is done here in turns, and sending is "
  "copying. Bytes are those of any mesh; times and the crossover are not: a "
  "real interconnect makes bytes dearer and work cheaper."
)

# --- what follows from it ---


def crossovers(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """From how many ids a device on `exchange` takes less time than `gather`.

  Returns:
    For each number of devices, distribution, of `WHAT`, and form of exchange:
    `gather_up_to` and `exchange_from`, neighbours among the measured numbers,
    and `about`, where the line between their ratios (both logarithmic) passes
    1. None stands for "at none of them"; `about` is then 0 if exchange is
    always faster and None if it never is.
  """
  cases: dict[tuple, dict[int, dict[str, float]]] = {}
  for record in records:
    for what in WHAT:
      key = (record["devices"], record["distribution"], what)
      times = cases.setdefault(key, {}).setdefault(record["ids_per_device"], {})
      times[record["strategy"]] = record[what]["median_ms"]
  found = []
  for (devices, distribution, what), by_ids in cases.items():
    for form in STRATEGIES[:2]:
      curve = [
        (ids, math.log(times[form] / times["gather"]))
        for ids, times in sorted(by_ids.items())
      ]
      found.append(
        {
          "devices": devices,
          "distribution": distribution,
          "what": what,
          "form": form,
          **_crossing(curve),
        }
      )
  return found


def _crossing(curve):
  """Where a curve of (ids, log ratio) goes below 0, and stays there."""
  slower = [i for i, (_, ratio) in enumerate(curve) if ratio >= 0]
  last = slower[-1] if slower else -1
  up_to = curve[last][0] if slower else None
  after = curve[last + 1][0] if last + 1 < len(curve) else None
  about = None if after is None else 0
  if slower and after is not None:
    (a, high), (b, low) = curve[last : last + 2]
    about = round(math.exp(math.log(a) + math.log(b / a) * high / (high - low)))
  return {"gather_up_to": up_to, "exchange_from": after, "about": about}


def typical(found: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
  """Median of `about` over devices and distributions, by form and what."""
  medians: dict[str, dict[str, Any]] = {}
  for form in STRATEGIES[:2]:
    for what in WHAT:
      about = [
        math.inf if one["about"] is None else one["about"]
        for one in found
        if one["form"] == form and one["what"] == what
      ]
      middle = statistics.median_low(about)
      middle = None if middle == math.inf else middle
      medians.setdefault(form, {})[what] = middle
  return medians


# --- the program ---


def define_flags() -> None:
  harness.define_common("sharded_lookup", repeats=5)
  text = "Parts to measure; the file's other one stays."
  flags.DEFINE_list("only", list(PARTS), text)
  number_flags.define("devices", [2, 4, 8], "Simulated devices.")
  ids = [64, 256, 1024, 4096, 16384]
  number_flags.define("ids", ids, "Ids of one device.")
  flags.DEFINE_list("distributions", ["zipf", "uniform"], "Of the ids.")
  flags.DEFINE_integer("rows", 2**18, "Of the table.")
  flags.DEFINE_integer("width", 64, "Of a row, float32.")
  tokens = [2048, 8192, 32768, 131072]
  number_flags.define("tokens", tokens, "Of one device's batch of text.")
  flags.DEFINE_integer(
    "text_rows", 2_262_400, "Of a head; 3 orders of 8 heads."
  )
  flags.DEFINE_integer("text_batches", 4, "Of each number of tokens.")
  flags.DEFINE_integer("length", 512, "Tokens of one sequence of text.")
  config = DataConfig()
  flags.DEFINE_integer("vocab_size", 4096, "Of the tokenizer.")
  for name in ("folder", "glob", "data_dir"):
    flags.DEFINE_string(name, getattr(config, name), "See `DataConfig`.")


def _lookup_part(args) -> dict[str, Any]:
  devices, ids = args.devices, args.ids
  sizes = {"rows": args.rows, "width": args.width}
  records = []
  for count in devices:
    # The whole takes minutes: somebody may be looking.
    print(f"measuring {count} devices ...", file=sys.stderr, flush=True)
    answer = harness.in_child(
      "experiments.benchmarks.lookup_runs:measure",
      env=harness.simulated_devices(count),
      devices=count,
      ids=ids,
      distributions=args.distributions,
      repeats=args.repeats,
      **sizes,
    )
    records += answer["records"]
  found = crossovers(records)
  return {
    "note": NOTE,
    "sizes": sizes,
    "repeats": args.repeats,
    "typical_crossover": typical(found),
    "crossovers": found,
    "records": records,
  }


def _text_part(args) -> dict[str, Any]:
  print("measuring text ...", file=sys.stderr, flush=True)
  sizes = {
    "rows_per_head": [args.text_rows] * 3,
    "heads": 8,
    "length": args.length,
    "batches": args.text_batches,
    "devices": max(args.devices),
  }
  names = ("folder", "glob", "data_dir", "vocab_size")
  answer = harness.in_child(
    "experiments.benchmarks.text_duplicates:measure",
    tokens=args.tokens,
    data={name: args[name].value for name in names},
    **sizes,
  )
  answer.pop("peak_mib")
  return {"sizes": sizes, **answer}


def _lookup_tables(part: Mapping[str, Any]) -> list[str]:
  cases: dict[tuple, dict[str, Any]] = {}
  for record in part["records"]:
    key = tuple(
      record[name] for name in ("devices", "distribution", "ids_per_device")
    )
    cases.setdefault(key, {})[record["strategy"]] = record
  first = ["devices, ids", "ids a device"]
  tables = []
  for what in WHAT:
    rows, sent = [], []
    for (devices, distribution, ids), of in cases.items():
      case = [f"{devices}, {distribution}", ids]
      rows.append(case + [of[name][what]["median_ms"] for name in STRATEGIES])
      kib = [of[name][what]["sent"] / 1024 for name in STRATEGIES]
      exchange_ = of["exchange"]
      least = exchange_[what]["least"] / 1024
      wasted = f"{100 * exchange_[what]['wasted']:.0f}%"
      sent.append([*case, *kib, least, wasted])
    columns = [*first, *STRATEGIES]
    tables += [f"{what}: ms", harness.aligned(columns, rows)]
    columns += ["least", "exchange wastes"]
    title = f"{what}: KiB that a device sends"
    tables += [title, harness.aligned(columns, sent)]
  columns = ["devices", "distribution", "what", "form", "gather_up_to"]
  columns += ["exchange_from", "about"]
  rows = [[str(one[c]) for c in columns[:4]] for one in part["crossovers"]]
  for row, one in zip(rows, part["crossovers"], strict=True):
    row += [one[c] for c in columns[4:]]
  rows = [[f"{a}, {b}", *rest] for a, b, *rest in rows]
  columns = ["devices, ids", "what", "form", "gather up to", "exchange from"]
  tables += [
    "exchange faster than gather",
    harness.aligned([*columns, "about"], rows),
    f"medians of the last column: {json.dumps(part['typical_crossover'])}",
    NOTE,
  ]
  return tables


def _text_table(part: Mapping[str, Any]) -> list[str]:
  orders = list(part["records"][0]["distinct"])
  columns = ["tokens of a device", *orders, "capacity factor"]
  rows = [
    [f"{r['tokens']:,}", *r["distinct"].values(), r["capacity_factor"]]
    for r in part["records"]
  ]
  title = "distinct rows over ids, by order; lookup_capacity that suffices"
  return [title, harness.aligned(columns, rows)]


def main(argv: Sequence[str]) -> None:
  del argv
  from experiments import results  # see `harness.launch`

  args = flags.FLAGS
  valid = f"one or more of {', '.join(PARTS)}"
  ok = bool(args.only) and set(args.only) <= set(PARTS)
  require(ok, "only", ",".join(args.only), valid)
  path = pathlib.Path(args.out).expanduser()
  # What is not measured now keeps its figures, and says when it was.
  result = {}
  if path.exists():
    before = json.loads(path.read_text())
    result = {name: before[name] for name in PARTS if name in before}
  tables = []
  makers = {
    "lookup": (_lookup_part, _lookup_tables),
    "text": (_text_part, _text_table),
  }
  for name in PARTS:
    if name not in args.only:
      continue
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    make, show = makers[name]
    part = make(args)
    measured = {"command": results.command(), "load_average_before": load}
    measured["environment"] = results.environment()
    result[name] = {"measured": measured, **part}
    tables += show(part)
  harness.publish(
    {name: result[name] for name in PARTS if name in result}, tables
  )


if __name__ == "__main__":
  harness.launch(define_flags, main)
