"""A training step against the number of rows: time, and peak memory.

  python -m experiments.benchmarks.table_scaling

The whole step of `training.step`, on a small transformer with one Engram
layer: hash, lookup, forward, backward, AdamW, and lazy Adam on touched rows. It
is compared with `dense`: the gradient of the whole table through the lookup,
and optax's Adam on all of it.

The step without its transformer, `memory`, is timed too: a larger model hides
more of what a larger table costs, and there it has nothing to hide behind.

To reach: the step at 2e7 rows at most 1.2 times the step at 1e5; peak memory at
most three tables (the rows and two moments) plus what the smallest needs.

Every step has another batch of random tokens, so that it reads rows which no
cache holds: the worst case, text repeats its n-grams. Times come from pairs
that take turns in one process; the peak of a line from a process of its own.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from engram_jax.errors import require
from experiments.benchmarks import harness
from experiments.benchmarks.scaling_runs import DEFAULTS, TABLES, Run

HERE = "experiments.benchmarks.table_scaling"
TARGET_RATIO = 1.2
TARGET_TABLES = 3


def measure(
  runs: Sequence[tuple[str, int]],
  *,
  sizes: Mapping[str, int] | None = None,
  repeats: int,
) -> dict[str, Any]:
  """Times steps of several runs in turns, in this process.

  Args:
    runs: (form, rows) of each; the form is one of `TABLES`.
    sizes: what differs from `DEFAULTS`.
    repeats: timed steps of each.

  Returns:
    `records`, one per run: `form`, `rows`, `table_mib`, the times of
    `harness.interleaved`, and `loss` of the last step.

  Raises:
    InputError: an unknown form, or runs that do not fit in memory.
  """
  sizes = {**DEFAULTS, **(sizes or {})}
  needed = 0
  for form, rows in runs:
    require(form in TABLES, "form", form, f"one of {', '.join(TABLES)}")
    least = 4 * sizes["heads"]
    require(rows >= least, "rows", rows, f"at least {least}, two a head")
    needed += TABLES[form] * _table_bytes(rows, sizes)
  harness.require_memory("rows", [rows for _, rows in runs], needed)
  made = [Run(form, rows, sizes) for form, rows in runs]
  times = harness.interleaved(dict(enumerate(made)), repeats=repeats)
  records = []
  for (form, _), run, taken in zip(runs, made, times.values(), strict=True):
    _, metrics = run()
    mib = round(_table_bytes(run.num_rows, sizes) / harness.MIB, 1)
    record = {"form": form, "rows": run.num_rows, "table_mib": mib}
    records.append({**record, **taken, "loss": float(metrics["loss"])})
  return {"records": records}


def _table_bytes(rows: int, sizes: Mapping[str, int]) -> int:
  return 4 * rows * sizes["head_dim"]


def verdict(
  lines: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]]
) -> dict[str, Any]:
  """Whether the targets are reached, by the largest run of the sparse form."""
  sparse = [line for line in lines if line["form"] == "sparse"]
  smallest, largest = sparse[0], sparse[-1]
  limit = TARGET_TABLES * largest["table_mib"] + smallest["peak_mib"]

  def last_ratio(name):
    return [pair["ratio"] for pair in pairs if pair["name"] == name][-1]

  return {
    "step_ratio": last_ratio("step"),
    "step_ratio_at_most": TARGET_RATIO,
    "step_reached": last_ratio("step") <= TARGET_RATIO,
    "memory_alone_ratio": last_ratio("memory"),
    "peak_mib": largest["peak_mib"],
    "peak_mib_at_most": limit,
    "peak_reached": largest["peak_mib"] <= limit,
  }


def define_flags() -> None:
  harness.define_common("table_scaling", repeats=15)
  rows = ["100_000", "1_000_000", "10_000_000", "20_000_000"]
  flags.DEFINE_list("rows", rows, "Row-sparse, ascending.")
  rows = ["100_000", "1_000_000", "5_000_000"]
  flags.DEFINE_list("dense_rows", rows, "Dense; compared at the same rows.")
  for name, value in DEFAULTS.items():
    flags.DEFINE_integer(name, value, "Of the model or its batches.")


def main(argv: Sequence[str]) -> None:
  del argv
  args = flags.FLAGS
  sizes = {name: args[name].value for name in DEFAULTS}
  rows, dense_rows = ([int(r) for r in x] for x in (args.rows, args.dense_rows))
  valid = "two or more numbers, ascending"
  require(len(rows) >= 2 and sorted(rows) == rows, "rows", rows, valid)

  def child(*runs, repeats=args.repeats):
    # The whole takes many minutes: somebody may be looking.
    names = " and ".join(f"{form} {count:,}" for form, count in runs)
    print(f"measuring {names} ...", file=sys.stderr, flush=True)
    return harness.in_child(
      f"{HERE}:measure", runs=runs, sizes=sizes, repeats=repeats
    )

  lines = []
  for form, count in [("sparse", r) for r in rows] + [
    ("dense", r) for r in dense_rows
  ]:
    answer = child((form, count))
    lines.append({**answer["records"][0], "peak_mib": answer["peak_mib"]})
  contests = [("step", "sparse", rows[0], "sparse", r) for r in rows[1:]]
  contests += [("memory", "memory", rows[0], "memory", r) for r in rows[1:]]
  contests += [("dense", "sparse", r, "dense", r) for r in dense_rows]
  pairs = []
  for name, form, count, other, other_count in contests:
    a, b = child((form, count), (other, other_count))["records"]
    ratio = b["median_ms"] / a["median_ms"]
    pairs.append({"name": name, "records": [a, b], "ratio": ratio})

  result = {
    "targets": verdict(lines, pairs),
    "sizes": sizes,
    "repeats": args.repeats,
    "lines": lines,
    "pairs": pairs,
  }
  columns = "form rows table_mib median_ms min_ms first_s peak_mib".split()
  table = [[line[name] for name in columns] for line in lines]
  pair_table = [
    (
      f"{b['form']} {b['rows']:,} / {a['form']} {a['rows']:,}",
      a["median_ms"],
      b["median_ms"],
      pair["ratio"],
    )
    for pair in pairs
    for a, b in [pair["records"]]
  ]
  harness.publish(
    result,
    [
      harness.aligned(columns, table),
      harness.aligned(
        ["in turns", "ms below", "ms above", "ratio"], pair_table
      ),
      json.dumps(result["targets"], indent=1),
    ],
  )


if __name__ == "__main__":
  harness.launch(define_flags, main)
