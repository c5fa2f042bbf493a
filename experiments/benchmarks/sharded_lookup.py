"""Rows looked up on all devices: time, and bytes sent.

  python -m experiments.benchmarks.sharded_lookup

`lookup`, on simulated CPU devices, each number of them in a process of its own:

  exchange  `memory.exchange` with the room that training starts with
            (`mesh.lookup_capacity`), or what its batch then needs
  gather    `memory.exchange` for few ids
  plain     table[ids] jitted with shardings, which XLA partitions; its
            gradient, of the whole table, pinned to where the table lies

The first two end with each row's gradient, summed, at its owner; the last one
with a dense gradient, which costs more the larger the table. All are compared:
the same rows, the same sums.

Bytes are those that a device sends, read from the compiled program, next to the
least that is possible: each distinct row of a device that lives elsewhere,
once, and its gradient once. The rest is padding, duplicates and ids.
"""

from collections.abc import Callable, Mapping, Sequence
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
  mesh: Mesh, strategy: str, what: str, capacity: int | None
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

    tokens, home = (
      NamedSharding(mesh, spec) for spec in (sharding.TOKENS, sharding.TABLE)
    )
    if what == LOOKED_UP:
      return jax.jit(look_up, out_shardings=tokens)
    return jax.jit(both, out_shardings=(tokens, home))

  def form(table, ids, gradients):
    with sharding.use(mesh):
      found, plan = exchange.lookup(
        {LAYER: table}, {LAYER: ids}, strategy=strategy, capacity=capacity
      )
      if what == LOOKED_UP:
        return found[LAYER]
      home = exchange.reduce_row_gradients(
        plan, {LAYER: gradients}, num_rows={LAYER: table.shape[0]}
      )
      return found[LAYER], home[LAYER]

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


def check(
  forms: Mapping[tuple[str, str], Callable], arguments: Any, table: np.ndarray
) -> None:
  """Refuses forms that do not give the table's rows, and the same sums.

  Args:
    forms: by strategy and what of `WHAT`.
    arguments: table, ids and gradients, as the forms take them.
    table: the same table.

  Raises:
    RuntimeError: one that gives others.
  """
  _, ids, gradients = map(np.asarray, arguments)
  expected = np.zeros_like(table)
  rows, width = table.shape
  np.add.at(expected, ids.reshape(-1), gradients.reshape(-1, width))
  for (strategy, what), form in forms.items():
    found = form(*arguments)
    found, home = (found, expected) if what == LOOKED_UP else found
    if not hasattr(home, "shape"):  # `RowGradients` that lie at the owners
      shard, dense = rows // len(ids), np.zeros_like(table)
      row_ids = np.asarray(home.row_ids).reshape(len(ids), -1)
      values = np.asarray(home.values).reshape(len(ids), -1, width)
      for owner, (here, of) in enumerate(zip(row_ids, values)):
        dense[owner * shard + here[here < shard]] = of[here < shard]
      home = dense
    agree = np.array_equal(found, table[ids]) and np.array_equal(home, expected)
    if not agree:
      raise RuntimeError(f"{strategy}, {what}: not what the table holds")


def on_devices(
  *,
  devices: int,
  ids: Sequence[int],
  distributions: Sequence[str],
  rows: int,
  width: int,
  repeats: int,
) -> harness.Figures:
  """One record per distribution, number of ids and strategy.

  Args:
    devices: as many as this process has, 2 at least.
    ids: M of each device.
    distributions: distributions of the ids, some of `DISTRIBUTIONS`.
    rows: R, rounded up to a multiple of the devices.
    width: d, float32.
    repeats: timed turns of each form; a turn is one call with many ids, and up
      to 16 with few.

  Returns:
    `records`: what the ids ask for (`demand`); `capacity`, None where there is
    none; `calls` of a turn; and for each of `WHAT` `median_ms` and `min_ms` of
    a call, `sent`, bytes that a device sends, `least`, those that it must, and
    `wasted`, the share of `sent` above that.

  Raises:
    InputError: another number of devices, or an unknown distribution.
    RuntimeError: the strategies disagree.
  """
  count = jax.device_count()
  ok = devices == count >= 2
  require(ok, "devices", devices, f"this process's {count}, 2 or more")
  mesh = sharding.make_mesh(MeshConfig(data=devices))
  rows = sharding.padded_rows(rows, devices)
  table = harness.rng(1).normal(size=(rows, width)).astype(np.float32)
  placed = jax.device_put(table, NamedSharding(mesh, sharding.TABLE))
  tokens = NamedSharding(mesh, sharding.TOKENS)
  records = []
  for distribution in distributions:
    for number in ids:
      drawn = draw_ids(distribution, (devices, number), rows)
      asked = demand(drawn, rows)
      # Whole numbers, so that sums in any order are equal.
      gradients = harness.rng(2).integers(-8, 9, (devices, number, 1, width))
      arguments = (
        placed,
        jax.device_put(drawn[..., None], tokens),
        jax.device_put(gradients.astype(np.float32), tokens),
      )
      capacities = dict.fromkeys(STRATEGIES)
      needed = asked["needed"]
      capacities["exchange"] = capacity_for(number, devices, needed)
      forms = {
        (strategy, what): make_form(mesh, strategy, what, capacities[strategy])
        .lower(*arguments)
        .compile()
        for strategy in STRATEGIES
        for what in WHAT
      }
      check(forms, arguments, table)
      calls = max(1, min(16, max(ids) // number))

      def turn(form, arguments=arguments, calls=calls):
        # Each call is waited for, as in a decoder: collectives of two programs
        # at a time may wait for each other on a CPU.
        for _ in range(calls):
          found = jax.block_until_ready(form(*arguments))
        return found

      cases = {
        name: lambda form=form: turn(form) for name, form in forms.items()
      }
      times = harness.interleaved(cases, repeats=repeats)
      for strategy in STRATEGIES:
        record = {
          "devices": devices,
          "distribution": distribution,
          "ids_per_device": number,
          "strategy": strategy,
          **{k: asked[k] for k in ("distinct", "needed")},
          "capacity": capacities[strategy],
          "calls": calls,
        }
        for way, what in enumerate(WHAT, start=1):
          sent = bytes_sent(forms[strategy, what], devices)
          least = way * 4 * width * asked["foreign"]
          taken = times[strategy, what]
          ms = {k: taken[k] / calls for k in ("median_ms", "min_ms")}
          bytes_ = {"sent": sent, "least": least, "wasted": 1 - least / sent}
          record[what] = ms | bytes_
        records.append(record)
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
  cases: dict[tuple, harness.Figures] = {}
  for r in result["records"]:
    key = r["devices"], r["distribution"], r["ids_per_device"]
    case = cases.setdefault(key, {"case": f"{key[0]}, {key[1]}", "ids": key[2]})
    case[r["strategy"]] = r
  first = {"devices, ids": "case", "ids a device": "ids"}
  found = []
  for what in WHAT:
    ms = {name: f"{name}.{what}.median_ms" for name in STRATEGIES}
    title = f"{what}: ms"
    found.append(harness.table(first | ms, cases.values(), title=title))
    paths = {name: (name, "sent") for name in STRATEGIES}
    paths["least"] = "exchange", "least"
    kib = {
      header: lambda c, name=name, key=key, what=what: c[name][what][key] / 1024
      for header, (name, key) in paths.items()
    }
    title = f"{what}: KiB that a device sends"
    found.append(harness.table(first | kib, cases.values(), title=title))
  return [*found, result["note"]]


BENCHMARK = harness.Benchmark(measure, tables, FLAGS)

if __name__ == "__main__":
  harness.run(BENCHMARK)
