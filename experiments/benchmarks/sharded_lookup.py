"""Rows looked up on all devices: time, and bytes sent.

  python -m experiments.benchmarks.sharded_lookup

`lookup`, on simulated CPU devices, each number of them in a process of its own:

  exchange  `memory.exchange` with the room that training starts with
            (`mesh.lookup_capacity`), or what its batch then needs
  gather    `memory.exchange` for few ids
  plain     table[ids] jitted with shardings, which XLA partitions; its
            gradient, of the whole table, pinned to where the table lies

The first two end with each row's gradient, summed, at its owner; the last one
with a dense gradient, which costs more the larger the table. All give the same
rows; `tests/eight_devices` compares the sums too.

Bytes are those that a device sends, read from the compiled program, next to the
least that is possible: each distinct row of a device that lives elsewhere,
once, and its gradient once. The rest is padding, duplicates and ids.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from engram_jax import sharding
from engram_jax.analysis.compiled import collectives
from engram_jax.errors import require
from engram_jax.memory import exchange
from engram_jax.memory.table import lookup
from engram_jax.run_config import MeshConfig
from engram_jax.training.setup import LookupCapacity
from experiments.benchmarks import harness
from experiments.benchmarks.fixtures import DISTRIBUTIONS, draw_ids

STRATEGIES = ("exchange", "gather", "plain")
#: What is timed.
LOOKED_UP, BOTH = WHAT = ("lookup", "lookup + reduce")
LAYER = 1
NOTE = (
  "Simulated devices are threads that share this machine's cores and memory: "
  "work that a mesh does side by side is done here in turns, and sending is "
  "copying. Bytes are those of any mesh; times are not: a real interconnect "
  "makes bytes dearer and work cheaper."
)
FLAGS = {
  "devices": ([2, 4, 8], "Simulated devices."),
  "ids": ([64, 256, 1024, 4096, 16384], "Ids of one device."),
  "distributions": (list(DISTRIBUTIONS), "Of the ids."),
  "rows": (2**18, "Of the table."),
  "width": (64, "Of a row, float32."),
  "repeats": (5, "Timed turns of each form."),
}


def demand(ids: np.ndarray, rows: int) -> dict[str, float]:
  """What the devices ask of each other.

  Args:
    ids: [devices, M].
    rows: R of the table; a multiple of the devices.

  Returns:
    `distinct`, over ids, mean of the devices; `foreign`, distinct rows of a
    device that live elsewhere, mean; `needed`, most that one asks of another.
  """
  devices = len(ids)
  asked = [
    np.bincount(np.unique(part) // (rows // devices), minlength=devices)
    for part in ids
  ]
  foreign = [count.sum() - count[i] for i, count in enumerate(asked)]
  return {
    "distinct": float(np.sum(asked) / ids.size),
    "foreign": float(np.mean(foreign)),
    "needed": int(np.max(asked)),
  }


def capacity_for(number: int, devices: int, needed: int) -> int:
  """Room of the exchange, as a training run comes to have it."""
  factor = MeshConfig().lookup_capacity
  first = exchange.mean_capacity(number, devices, factor=factor)
  capacity = LookupCapacity(first, number)
  return capacity.rows if first >= needed else capacity.grown(needed).rows


def make_form(
  mesh: Mesh, strategy: str, what: str, capacity: int
) -> Callable[..., Any]:
  """A jitted function of (table, ids, gradients): rows, and with `BOTH` what
  the owners of the rows then have."""
  if strategy == "plain":

    def look_up(table, ids, gradients):
      del gradients
      return lookup(table, ids)

    def both(table, ids, gradients):
      rows, back = jax.vjp(lambda table: lookup(table, ids), table)
      return rows, *back(gradients)

    tokens, owned = (
      NamedSharding(mesh, spec) for spec in (sharding.TOKENS, sharding.TABLE)
    )
    if what == LOOKED_UP:
      return jax.jit(look_up, out_shardings=tokens)
    return jax.jit(both, out_shardings=(tokens, owned))

  def form(table, ids, gradients):
    room = capacity if strategy == "exchange" else None
    with sharding.use(mesh):
      found, plan = exchange.lookup(
        {LAYER: table}, {LAYER: ids}, strategy=strategy, capacity=room
      )
      if what == LOOKED_UP:
        return found[LAYER]
      sums = exchange.reduce_row_gradients(
        plan, {LAYER: gradients}, num_rows={LAYER: table.shape[0]}
      )
      return found[LAYER], sums[LAYER]

  return jax.jit(form)


def bytes_sent(compiled: Any, devices: int) -> int:
  """Bytes that a device sends to others in one run of a program.

  Of a collective over n devices whose larger side has S bytes, (n - 1) / n S:
  a device keeps its own part. An all-reduce is a reduce-scatter and an
  all-gather.

  Args:
    compiled: a program, or its text.
    devices: n, all of which take part in every collective.
  """
  total = 0
  for one in collectives(compiled):
    assert not one.in_loop, one
    passes = {"all-reduce": 2, "collective-permute": devices / (devices - 1)}
    total += passes.get(one.kind, 1) * one.count * one.bytes
  return round(total * (devices - 1) / devices)


def in_turns(
  mesh: Mesh,
  table: np.ndarray,
  ids: np.ndarray,
  *,
  calls: int,
  repeats: int,
) -> harness.Figures:
  """All strategies in turns.

  Args:
    mesh: mesh of all devices.
    table: float32 [R, d].
    ids: int32 [devices, M].
    calls: calls in a turn.
    repeats: timed turns of each form.

  Returns:
    What the ids ask for (`demand`); `capacity` of the exchange; and by strategy
    and what of `WHAT`: `median_ms` and `min_ms` of a call, `sent`, bytes that a
    device sends, `least`, those that it must, and `wasted`, the share of `sent`
    above that.

  Raises:
    RuntimeError: a strategy gives other rows than the table's.
  """
  (devices, number), width = ids.shape, table.shape[1]
  tokens = NamedSharding(mesh, sharding.TOKENS)
  gradients = harness.rng(2).normal(size=(devices, number, 1, width))
  arguments = (
    jax.device_put(table, NamedSharding(mesh, sharding.TABLE)),
    jax.device_put(ids[..., None], tokens),
    jax.device_put(gradients.astype(np.float32), tokens),
  )
  asked = demand(ids, len(table))
  capacity = capacity_for(number, devices, asked["needed"])
  forms = {
    case: make_form(mesh, *case, capacity).lower(*arguments).compile()
    for case in itertools.product(STRATEGIES, WHAT)
  }
  for (strategy, what), form in forms.items():
    rows = form(*arguments)
    rows = rows if what == LOOKED_UP else rows[0]
    if not np.array_equal(rows, table[ids[..., None]]):
      raise RuntimeError(f"{strategy}, {what}: not what the table holds")

  def turn(form):
    # Each call is waited for, as in a decoder: collectives of two programs at a
    # time may wait for each other on a CPU.
    for _ in range(calls):
      found = jax.block_until_ready(form(*arguments))
    return found

  turns = {case: functools.partial(turn, x) for case, x in forms.items()}
  times = harness.interleaved(turns, repeats=repeats)
  found: harness.Figures = {name: {} for name in STRATEGIES}
  for (strategy, what), form in forms.items():
    taken, sent = times[strategy, what], bytes_sent(form, devices)
    least = (2 if what == BOTH else 1) * 4 * width * asked["foreign"]
    ms = {k: taken[k] / calls for k in ("median_ms", "min_ms")}
    bytes_ = {"sent": sent, "least": least, "wasted": 1 - least / sent}
    found[strategy][what] = ms | bytes_
  return {**asked, "capacity": capacity, **found}


def on_devices(
  *,
  devices: int,
  ids: Sequence[int],
  distributions: Sequence[str],
  rows: int,
  width: int,
  repeats: int,
) -> harness.Figures:
  """All cases on the devices of this process; arguments as the flags.

  A turn is one call with many ids, and up to 16 with few.

  Raises:
    InputError: another number of devices, or an unknown distribution.
  """
  count = jax.device_count()
  ok = devices == count >= 2
  require(ok, "devices", devices, f"this process's {count}, 2 or more")
  mesh = sharding.make_mesh(MeshConfig(data=devices))
  rows = sharding.padded_rows(rows, devices)
  table = harness.rng(1).normal(size=(rows, width)).astype(np.float32)
  records = []
  for distribution, number in itertools.product(distributions, ids):
    drawn = draw_ids(distribution, (devices, number), rows)
    calls = max(1, min(16, max(ids) // number))
    found = in_turns(mesh, table, drawn, calls=calls, repeats=repeats)
    case = {"devices": devices, "distribution": distribution, "ids": number}
    records.append({**case, "calls": calls, **found})
  return {"records": records}


def measure(*, devices: Sequence[int], **sizes: Any) -> harness.Figures:
  """All numbers of devices; arguments as the flags."""
  records = []
  for count in devices:
    env = harness.simulated_devices(count)
    answer = harness.in_child(on_devices, env=env, devices=count, **sizes)
    records += answer["records"]
  return {"note": NOTE, "records": records}


def tables(result: harness.Figures) -> list[str]:
  case = {"ids": "distribution", "devices": "devices", "ids a device": "ids"}
  texts = []
  for what in WHAT:
    ms = {name: f"{name}.{what}.median_ms" for name in STRATEGIES}
    sent = {name: f"{name}.{what}.sent" for name in STRATEGIES}
    sent["least"] = f"exchange.{what}.least"
    kib = {name: harness.scaled(path, 1024) for name, path in sent.items()}
    for title, columns in (("ms", ms), ("KiB that a device sends", kib)):
      title = f"{what}: {title}"
      texts.append(
        harness.table(case | columns, result["records"], title=title)
      )
  return [*texts, result["note"]]


BENCHMARK = harness.Benchmark(measure, tables, FLAGS)

if __name__ == "__main__":
  harness.run(BENCHMARK)
