"""A training step against the number of rows: time, and peak memory.

  python -m experiments.benchmarks.table_scaling
  python -m experiments.benchmarks.table_scaling --devices=8

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

With --devices the table lies over that many simulated devices, which split the
batch, and rows travel between them (`memory.exchange`). They share the cores of
this machine: the figures say how the step grows with the table, not how fast a
mesh is. Its rows are narrower, so that 1e8 of them and their moments fit into
its memory; what is compared with is the smallest table, not `dense`.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from engram_jax.errors import require
from experiments import number_flags
from experiments.benchmarks import harness
from experiments.benchmarks.scaling_runs import DEFAULTS, TABLES, Run

HERE = "experiments.benchmarks.table_scaling"
TARGET_RATIO = 1.2
TARGET_TABLES = 3
#: What the flags are with --devices, where they are not given. 16 wide, a row
#: and its moments take 192 bytes: 1e8 of them 18 GiB.
ON_A_MESH = {
  "rows": ["100_000", "1_000_000", "10_000_000", "100_000_000"],
  "dense_rows": [],
  "head_dim": 16,
  "out": str(harness.RESULTS / "table_scaling_mesh.json"),
}


def measure(
  runs: Sequence[tuple[str, int]],
  *,
  sizes: Mapping[str, int] | None = None,
  devices: int = 1,
  repeats: int,
) -> dict[str, Any]:
  """Times steps of several runs in turns, in this process.

  Args:
    runs: (form, rows) of each; the form is one of `TABLES`.
    sizes: what differs from `DEFAULTS`.
    devices: 1, or as many as this process has, which then share each table.
    repeats: timed steps of each.

  Returns:
    `records`, one per run: `form`, `rows`, `table_mib`, the times of
    `harness.interleaved`, and `loss` of the last step; on several devices
    `capacity` too.

  Raises:
    InputError: an unknown form, one that several devices do not have, another
      number of devices, or runs that do not fit in memory.
  """
  sizes = {**DEFAULTS, **(sizes or {})}
  needed = 0
  for form, rows in runs:
    known = [name for name in TABLES if devices == 1 or name != "dense"]
    require(form in known, "form", form, f"one of {', '.join(known)}")
    least = 4 * sizes["heads"]
    require(rows >= least, "rows", rows, f"at least {least}, two a head")
    needed += TABLES[form] * _table_bytes(rows, sizes)
  batch = sizes["batch"]
  valid = f"a multiple of devices = {devices}"
  require(batch % devices == 0, "batch", batch, valid)
  harness.require_memory("rows", [rows for _, rows in runs], needed)
  made = [Run(form, rows, sizes, devices=devices) for form, rows in runs]
  times = harness.interleaved(dict(enumerate(made)), repeats=repeats)
  records = []
  for (form, _), run, taken in zip(runs, made, times.values(), strict=True):
    _, metrics = run()
    if run.capacity is not None:
      assert metrics["lookup_needed"] <= run.capacity
    mib = round(_table_bytes(run.num_rows, sizes) / harness.MIB, 1)
    record = {"form": form, "rows": run.num_rows, "table_mib": mib}
    if devices > 1:
      record["capacity"] = run.capacity
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
  rows = [100_000, 1_000_000, 10_000_000, 20_000_000]
  number_flags.define("rows", rows, "Row-sparse, ascending.")
  rows = [100_000, 1_000_000, 5_000_000]
  number_flags.define("dense_rows", rows, "Dense; compared at the same rows.")
  text = "Simulated devices that share the table; see the top of the file."
  flags.DEFINE_integer("devices", 1, text)
  for name, value in DEFAULTS.items():
    flags.DEFINE_integer(name, value, "Of the model or its batches.")


def main(argv: Sequence[str]) -> None:
  del argv
  args = flags.FLAGS
  devices = args.devices
  env = harness.simulated_devices(devices) if devices != 1 else None
  if env is not None:
    harness.set_defaults(ON_A_MESH)
  valid = "none with devices: the smallest table is compared with"
  ok = env is None or not args.dense_rows
  require(ok, "dense_rows", ",".join(map(str, args.dense_rows)), valid)
  sizes = {name: args[name].value for name in DEFAULTS}
  rows, dense_rows = args.rows, args.dense_rows
  valid = "two or more numbers, ascending"
  require(len(rows) >= 2 and sorted(rows) == rows, "rows", rows, valid)

  def child(*runs, repeats=args.repeats):
    # The whole takes many minutes: somebody may be looking.
    names = " and ".join(f"{form} {count:,}" for form, count in runs)
    print(f"measuring {names} ...", file=sys.stderr, flush=True)
    return harness.in_child(
      f"{HERE}:measure",
      env=env,
      runs=runs,
      sizes=sizes,
      devices=devices,
      repeats=repeats,
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
    "devices": devices,
    "bytes_per_row": TABLES["sparse"] * _table_bytes(1, sizes),
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
  title = (
    f"{devices} device{'s'[: devices > 1]}; {sizes['head_dim']} numbers a row: "
    f"{result['bytes_per_row']} bytes with its moments"
  )
  harness.publish(
    result,
    [
      title,
      harness.aligned(columns, table),
      harness.aligned(
        ["in turns", "ms below", "ms above", "ratio"], pair_table
      ),
      json.dumps(result["targets"], indent=1),
    ],
  )


if __name__ == "__main__":
  harness.launch(define_flags, main)
