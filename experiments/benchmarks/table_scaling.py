"""A training step against the number of rows: time, and peak memory.

  python -m experiments.benchmarks.table_scaling
  python -m experiments.benchmarks.table_scaling --devices=8 --dense_rows= \
    --head_dim=16 --rows=100_000,1_000_000,10_000_000,100_000_000 \
    --out=experiments/results/table_scaling_mesh.json

The whole step of `training.step`, on a small transformer with one Engram
layer: hash, lookup, forward, backward, AdamW, and lazy Adam on touched rows. It
is compared with `dense`, the same with the gradient of the whole table and
optax's Adam on all of it (`memory.row_sparse.dense`). A larger model hides more
of what a larger table costs; with --hidden_size=16 there is next to nothing to
hide behind.

To reach: the step at 2e7 rows at most 1.2 times the step at 1e5; peak memory at
most three tables (the rows and two moments) plus what the smallest needs.

Every step has another batch of random tokens, so that it reads rows which no
cache holds: the worst case, text repeats its n-grams. Times come from pairs
that take turns in one process; the peak of a line from a process of its own.

With --devices the table lies over that many simulated devices, which split the
batch, and rows travel between them (`memory.exchange`). They share the cores of
this machine: the figures say how the step grows with the table, not how fast a
mesh is. Rows of 16 and their moments take 192 bytes, 1e8 of them 18 GiB; what
is compared with is the smallest table, not `dense`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

from engram_jax import sharding
from engram_jax.config import AttentionConfig, EngramConfig, ModelConfig
from engram_jax.errors import require
from engram_jax.memory.row_sparse import dense
from engram_jax.run_config import MeshConfig, TrainConfig
from engram_jax.training.setup import TrainSetup
from engram_jax.training.state import TrainState
from engram_jax.training.step import make_train_step
from experiments.benchmarks import harness, models

LAYER = 1
TARGET_RATIO = 1.2
TARGET_TABLES = 3
#: Forms of a step, by the tables' worth of memory at its peak; the dense
#: one has a gradient and an update besides table and moments.
TABLES = {"sparse": 3, "dense": 5}
SIZES = {
  "hidden_size": (256, "Of the model."),
  "num_layers": (2, "Blocks."),
  "heads": (8, "Of an order."),
  "head_dim": (64, "Numbers of a row."),
  "batch": (8, "Sequences of a step."),
  "length": (128, "Tokens of a sequence."),
  "vocab_size": (4096, "Of the tokens."),
}
FLAGS = {
  "rows": ([100_000, 1_000_000, 10_000_000, 20_000_000], "Sparse, ascending."),
  "dense_rows": ([100_000, 1_000_000, 5_000_000], "Dense, beside as many."),
  "devices": (1, "Simulated devices that share the table; see the file's top."),
  "repeats": (15, "Timed steps of each."),
  **SIZES,
}


def make_setup(
  form: str, rows: int, *, devices: int = 1, **sizes: int
) -> TrainSetup:
  """The training of a small transformer with about so many rows, in a form."""
  heads, width = sizes["heads"], sizes["hidden_size"]
  found = jax.device_count()
  valid = f"1, or this process's {found}"
  require(devices in (1, found), "devices", devices, valid)
  memory = EngramConfig(
    hidden_size=width,
    layers=(LAYER,),
    rows_per_head=(rows // (2 * heads),) * 2,
    heads=heads,
    head_dim=sizes["head_dim"],
    pad_id=0,
    table_init_std=0.0,  # drawing noise would be the peak of memory
  )
  attention = AttentionConfig(
    num_heads=4,
    nope_dim=width // 4,
    rope_dim=16,
    value_dim=width // 4 + 16,
    kv_rank=width // 2,
  )
  model = ModelConfig(
    vocab_size=sizes["vocab_size"],
    hidden_size=width,
    num_layers=sizes["num_layers"],
    attention=attention,
    dense_size=3 * width,
    engram=memory,
  )
  train = TrainConfig(
    steps=10_000,
    batch_size=sizes["batch"],
    seq_len=sizes["length"],
    warmup_steps=0,
  )
  # One of several is a run without a mesh, on the first.
  mesh = sharding.make_mesh(MeshConfig()) if devices > 1 else None
  adam = optax.scale_by_adam(train.adam_b1, train.adam_b2, train.adam_eps)
  optimizer = dense(adam) if form == "dense" else None
  return models.make_setup(model, train, mesh=mesh, row_optimizer=optimizer)


def make_state(setup: TrainSetup) -> TrainState:
  """The state of a run, every page of it real."""
  state = setup.init_state()
  tables, states = harness.resident((state.tables, state.table_states))
  return dataclasses.replace(state, tables=tables, table_states=states)


def room(setup: TrainSetup, batches: Sequence[models.Batch]) -> int | None:
  """The capacity that a training run over these batches comes to have."""
  capacity = setup.lookup_capacity(batches[0])
  if capacity.rows is None:
    return None
  devices = sharding.size(setup.mesh)
  shard = sharding.padded_rows(setup.memory.num_rows[LAYER], devices)
  for batch in batches:
    ids = setup.memory.row_ids_numpy(batch["inputs"], breaks=batch["breaks"])
    for part in np.split(ids[LAYER], devices):
      needed = np.bincount(np.unique(part) * devices // shard).max()
      if not capacity.suffices(needed):
        capacity = capacity.grown(needed)
  return capacity.rows


def in_turns(
  *,
  runs: Sequence[tuple[str, int]],
  devices: int = 1,
  repeats: int,
  **sizes: int,
) -> harness.Figures:
  """Times steps of several runs in turns, in this process.

  Args:
    runs: (form, rows) of each; the form is one of `TABLES`.
    devices: 1, or as many as this process has; the others as the flags.

  Returns:
    `records`, one per run: `form`, `rows`, `table_mib`, the times of
    `harness.interleaved`, and `loss` of the last step; on several devices
    `capacity` too.

  Raises:
    InputError: an unknown form, one that several devices do not have, another
      number of devices, or runs that do not fit in memory.
  """
  width, needed = 4 * sizes["head_dim"], 0
  for form, rows in runs:
    known = [name for name in TABLES if devices == 1 or name != "dense"]
    require(form in known, "form", form, f"one of {', '.join(known)}")
    least = 4 * sizes["heads"]
    require(rows >= least, "rows", rows, f"at least {least}, two a head")
    needed += TABLES[form] * rows * width
  batch, valid = sizes["batch"], f"a multiple of devices = {devices}"
  require(batch % devices == 0, "batch", batch, valid)
  harness.require_memory("rows", [rows for _, rows in runs], needed)
  cases, records = {}, []
  for i, (form, rows) in enumerate(runs):
    setup = make_setup(form, rows, devices=devices, **sizes)
    batches = models.make_batches(setup, 16)
    record = {"form": form, "rows": setup.memory.num_rows[LAYER]}
    record["table_mib"] = round(record["rows"] * width / harness.MIB, 1)
    capacity = room(setup, batches)
    step = make_train_step(setup, capacity=capacity)
    record |= {"capacity": capacity} if devices > 1 else {}
    records.append(record)
    cases[i] = models.steps(step, make_state(setup), batches)
  times = harness.interleaved(cases, repeats=repeats)
  for i, record in enumerate(records):
    metrics = cases[i]()
    if record.get("capacity") is not None:
      assert metrics["lookup_needed"] <= record["capacity"]
    record |= {**times[i], "loss": float(metrics["loss"])}
  return {"records": records}


def targets(
  lines: Sequence[harness.Figures], pairs: Sequence[harness.Figures]
) -> harness.Figures:
  """Whether the targets are reached, by the largest run of the sparse form."""
  smallest, *_, largest = (x for x in lines if x["form"] == "sparse")
  most = TARGET_TABLES * largest["table_mib"] + smallest["peak_mib"]
  *_, step = (pair["ratio"] for pair in pairs if pair["name"] == "step")
  return {
    "step_ratio": harness.target(step, at_most=TARGET_RATIO),
    "peak_mib": harness.target(largest["peak_mib"], at_most=most),
  }


def measure(
  *,
  rows: Sequence[int],
  dense_rows: Sequence[int],
  devices: int,
  repeats: int,
  **sizes: int,
) -> harness.Figures:
  """Every line alone, then in pairs; arguments as the flags."""
  valid = "none with devices: the smallest table is compared with"
  listed = ",".join(map(str, dense_rows))
  require(devices == 1 or not dense_rows, "dense_rows", listed, valid)
  ascending = len(rows) >= 2 and sorted(rows) == rows
  require(ascending, "rows", rows, "two or more numbers, ascending")
  env = harness.simulated_devices(devices) if devices > 1 else None

  def child(*runs: tuple[str, int]) -> harness.Figures:
    fields = dict(sizes, runs=runs, devices=devices, repeats=repeats)
    return harness.in_child(in_turns, env=env, **fields)

  alone = [("sparse", n) for n in rows] + [("dense", n) for n in dense_rows]
  lines = []
  for run in alone:
    answer = child(run)
    lines.append({**answer["records"][0], "peak_mib": answer["peak_mib"]})
  pairs = [("step", alone[0], ("sparse", n)) for n in rows[1:]]
  pairs += [("dense", ("sparse", n), ("dense", n)) for n in dense_rows]
  contests = []
  for name, *runs in pairs:
    a, b = child(*runs)["records"]
    ratio = b["median_ms"] / a["median_ms"]
    contests.append({"name": name, "records": [a, b], "ratio": ratio})
  return {
    "targets": targets(lines, contests),
    "bytes_per_row": TABLES["sparse"] * 4 * sizes["head_dim"],
    "lines": lines,
    "pairs": contests,
  }


def tables(result: harness.Figures) -> list[str]:
  def runs(pair: harness.Figures) -> str:
    a, b = pair["records"]
    return f"{b['form']} {b['rows']:,} / {a['form']} {a['rows']:,}"

  names = "form rows table_mib median_ms min_ms first_s peak_mib".split()
  title = f"{result['bytes_per_row']} bytes a row with its moments"
  columns: dict[str, Any] = {"in turns": runs, "ratio": "ratio"}
  for i, header in enumerate(("ms below", "ms above")):
    columns[header] = lambda pair, i=i: pair["records"][i]["median_ms"]
  return [
    harness.table(names, result["lines"], title=title),
    harness.table(columns, result["pairs"]),
  ]


BENCHMARK = harness.Benchmark(measure, tables, FLAGS)

if __name__ == "__main__":
  harness.run(BENCHMARK)
