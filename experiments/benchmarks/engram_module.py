"""One Engram layer: forward, backward, a step; and its convolution apart.

  python -m experiments.benchmarks.engram_module

The sizes are those of the figures measured for the one other JAX
implementation, so that its rows can be set beside these: hidden 1024, 4
streams, orders 2 and 3, 8 heads of width 64 an order, 4 taps, 2 x 512 tokens,
float32. A line's peak memory is that of a process that ran it alone; times are
taken in turns, both table sizes in one process. All lines hash but the row
optimizer.

  forward                     hash, lookup, fuse
  forward + backward          gradients of parameters, hidden state and rows
  forward + backward, dense   of the whole table instead of its rows
  step                        and Adam: of parameters, and of touched rows
  rows' gradient              lookup, gradient of a sum of squares, duplicates
  table's gradient            the same as a dense array
  row optimizer               duplicates summed, lazy Adam
  hash                        row ids alone
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from engram_jax.errors import require
from experiments import number_flags
from experiments.benchmarks import harness
from experiments.benchmarks.engram_lines import (
  DENSE,
  LINES,
  TABLES,
  Layer,
  Sizes,
)

HERE = "experiments.benchmarks.engram_module"


def measure(
  rows_per_head: Sequence[int],
  *,
  lines: Sequence[str] = tuple(LINES),
  sizes: Mapping[str, int] | None = None,
  repeats: int,
) -> dict[str, Any]:
  """Times `lines` in turns, each at every table size.

  Args:
    rows_per_head: one entry per table size; `heads` of it an order.
    lines: of `LINES`.
    sizes: fields of `Sizes` that differ from the defaults.
    repeats: timed calls of each.

  Returns:
    `records`, one per line and table size: `line`, `rows`, `table_mib` and the
    times of `harness.interleaved`.

  Raises:
    InputError: an unknown line, or tables that do not fit in memory.
  """
  names = set()
  for line in lines:
    require(line in LINES, "lines", line, f"of {', '.join(LINES)}")
    names |= {*LINES[line][1], *LINES[line][2]}
  layers = [Layer(rows, Sizes(**(sizes or {}))) for rows in rows_per_head]
  held = sum(TABLES.get(name, 0) for name in names)
  needed = held * sum(layer.table_bytes for layer in layers)
  if any(line in DENSE for line in lines):
    needed += max(layer.table_bytes for layer in layers)
  harness.require_memory("rows_per_head", list(rows_per_head), needed)

  cases = {
    (line, i): layer.runs(line)
    for line in lines
    for i, layer in enumerate(layers)
  }
  records = []
  for (line, i), times in harness.interleaved(cases, repeats=repeats).items():
    mib = round(layers[i].table_bytes / harness.MIB, 1)
    size = {"rows": layers[i].num_rows, "table_mib": mib}
    records.append({"line": line, **size, **times})
  return {"records": records}


def define_flags() -> None:
  harness.define_common("engram_module", repeats=9)
  number_flags.define("rows_per_head", [64640, 646400], "Table sizes.")
  for name, value in Sizes()._asdict().items():
    flags.DEFINE_integer(name, value, "Of the layer or its input.")


def main(argv: Sequence[str]) -> None:
  del argv
  args = flags.FLAGS
  rows_per_head = args.rows_per_head
  sizes = {name: args[name].value for name in Sizes._fields}

  def child(rows_per_head, repeats, **lines):
    return harness.in_child(
      f"{HERE}:measure",
      rows_per_head=rows_per_head,
      sizes=sizes,
      repeats=repeats,
      **lines,
    )

  records = child(rows_per_head, args.repeats)["records"]
  for i, record in enumerate(records):
    rows = rows_per_head[i % len(rows_per_head)]
    record["peak_mib"] = child([rows], 1, lines=[record["line"]])["peak_mib"]
  names = ("batch", "length", "streams", "hidden_size", "taps")
  conv = harness.in_child(
    "experiments.benchmarks.convolution:measure",
    **{name: sizes[name] for name in names},
    dilation=3,  # the largest order, as in the paper
    repeats=args.repeats,
  )

  def median_ms(line):
    return [r["median_ms"] for r in records if r["line"] == line]

  tokens = math.prod((args.batch, args.length))
  result = {
    "sizes": sizes,
    "repeats": args.repeats,
    "step_ratio": median_ms("step")[-1] / median_ms("step")[0],
    "hash_ns_per_token": [1e6 * ms / tokens for ms in median_ms("hash")],
    "records": records,
    "convolution": conv,
  }
  times = ("median_ms", "min_ms", "first_s")
  header = ["", "rows", "ms", "least ms", "first s", "peak MiB"]
  columns = ("line", "rows", *times, "peak_mib")
  table = [[record[name] for name in columns] for record in records]
  conv_table = [
    [f"{r['line']}, {r['form']}", *(r[name] for name in times)]
    for r in conv["records"]
  ]
  ratios = "\n".join(
    f"{line}: nnx.Conv takes {ratio:.1f} times as long as short_conv"
    for line, ratio in conv["ratio"].items()
  )
  text = f"step at the last size over the first: {result['step_ratio']:.2f}"
  harness.publish(
    result,
    [
      harness.aligned(header, table),
      harness.aligned(["convolution", *header[2:5]], conv_table),
      f"{text}\n{ratios}",
    ],
  )


if __name__ == "__main__":
  harness.launch(define_flags, main)
