"""What `sharded_lookup` times: ways to read rows that lie on other devices.

Its functions run in a process of several simulated devices.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from engram_jax import sharding
from engram_jax.analysis.compiled import collectives
from engram_jax.errors import require
from engram_jax.memory import exchange
from engram_jax.memory.table import lookup
from engram_jax.run_config import MeshConfig
from engram_jax.training.program import Capacity
from experiments.benchmarks import harness

#: As `exchange` calls them, but for the room.
STRATEGIES = ("exchange", "exchange, full", "gather", "plain")
#: What is timed.
FETCH, BOTH = WHAT = ("fetch", "fetch + send_home")
LAYER = 1
#: About as many duplicates as bigrams and trigrams of the text have.
ZIPF = 1.1

# --- ids ---


def draw_ids(distribution: str, shape: Sequence[int], rows: int) -> np.ndarray:
  """int32 ids below `rows`; the frequent ones are anywhere in the table."""
  rng = np.random.default_rng(0)
  if distribution == "uniform":
    return rng.integers(0, rows, shape, dtype=np.int32)
  known = distribution == "zipf"
  require(known, "distributions", distribution, "of zipf, uniform")
  ranks = (rng.zipf(ZIPF, shape) - 1) % rows
  return rng.permutation(rows)[ranks].astype(np.int32)


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


# --- lookup: in a child of several devices ---


def measure(
  *,
  devices: int,
  ids: Sequence[int],
  distributions: Sequence[str],
  rows: int,
  width: int,
  repeats: int,
) -> dict[str, Any]:
  """One record per distribution, number of ids and strategy.

  Args:
    devices: as many as this process has, 2 at least.
    ids: M of each device.
    distributions: of the ids, `zipf` or `uniform`.
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
  rng = np.random.default_rng(1)
  table = rng.normal(size=(rows, width)).astype(np.float32)
  placed = jax.device_put(table, NamedSharding(mesh, sharding.TABLE))
  records, compiled = [], {}
  for distribution in distributions:
    for number in ids:
      drawn = draw_ids(distribution, (devices, number), rows)
      # Whole numbers: their sums are exact in any order.
      shape = (*drawn.shape, 1, width)
      gradients = rng.integers(-8, 9, shape).astype(np.float32)
      spread = NamedSharding(mesh, sharding.TOKENS)
      arguments = (
        placed,
        jax.device_put(drawn[..., None], spread),
        jax.device_put(gradients, spread),
      )
      asked = demand(drawn, rows)
      room = capacities(number, devices, asked["needed"])
      forms = {}
      for strategy in STRATEGIES:
        for what in WHAT:
          key = (number, strategy, what, room.get(strategy))
          if key not in compiled:
            form = make_form(mesh, strategy, what, room.get(strategy))
            compiled[key] = form.lower(*arguments).compile()
          forms[strategy, what] = compiled[key]
      _check(forms, arguments, table)
      calls = max(1, min(16, 2048 // number))
      turns = {
        key: _turn(form, arguments, calls) for key, form in forms.items()
      }
      times = harness.interleaved(turns, repeats=repeats)
      for strategy in STRATEGIES:
        record = {
          "devices": devices,
          "distribution": distribution,
          "ids_per_device": number,
          "strategy": strategy,
          "distinct": asked["distinct"],
          "needed": asked["needed"],
          "capacity": room.get(strategy),
          "calls": calls,
        }
        for way, what in enumerate(WHAT, start=1):
          sent = bytes_sent(forms[strategy, what], devices)
          least = way * 4 * width * asked["foreign"]
          record[what] = {
            "median_ms": times[strategy, what]["median_ms"] / calls,
            "min_ms": times[strategy, what]["min_ms"] / calls,
            "sent": sent,
            "least": least,
            "wasted": 1 - least / sent,
          }
        records.append(record)
  return {"records": records}


def capacities(number: int, devices: int, needed: int) -> dict[str, int]:
  """Room of each form of exchange, as a training run comes to have it."""
  shape = {LAYER: jax.ShapeDtypeStruct((devices, number, 1), jnp.int32)}
  full = exchange.ids_per_device(shape, devices)
  factor = MeshConfig().lookup_capacity
  first = exchange.mean_capacity(shape, devices, factor=factor)
  room = Capacity(first, full)
  room.suffices(needed)
  return {"exchange": room.rows, "exchange, full": full}


def make_form(mesh: Any, strategy: str, what: str, capacity: int | None) -> Any:
  """A jitted function of (table, ids, gradients): rows, and with `BOTH` what
  the owners of the rows then have."""
  if strategy == "plain":
    return _plain(mesh, what)

  def form(table, ids, gradients):
    rows = table.shape[0]
    with sharding.use(mesh):
      found, plan = exchange.fetch(
        {LAYER: table},
        {LAYER: ids},
        strategy=strategy.partition(",")[0],
        capacity=capacity,
      )
      if what == FETCH:
        return found[LAYER]
      home = exchange.send_home(
        plan, {LAYER: gradients}, num_rows={LAYER: rows}
      )
      return found[LAYER], home[LAYER]

  return jax.jit(form)


def _plain(mesh, what):
  tokens = NamedSharding(mesh, sharding.TOKENS)

  def fetch(table, ids, gradients):
    del gradients
    return lookup(table, ids)

  def both(table, ids, gradients):
    rows, back = jax.vjp(lambda table: lookup(table, ids), table)
    return rows, *back(gradients)

  if what == FETCH:
    return jax.jit(fetch, out_shardings=tokens)
  home = NamedSharding(mesh, sharding.TABLE)
  return jax.jit(both, out_shardings=(tokens, home))


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


def _turn(form, arguments, calls):
  """Several calls, where one would measure how long sleeping threads take to
  wake up. Each is waited for, as in a decoder: collectives of two programs at a
  time may wait for each other on a CPU."""

  def turn():
    for _ in range(calls):
      found = jax.block_until_ready(form(*arguments))
    return found

  return turn


def _check(forms, arguments, table):
  """The same rows, and the same sums of gradients, by all strategies."""
  _, ids, gradients = map(np.asarray, arguments)
  expected = np.zeros_like(table)
  width = table.shape[1]
  np.add.at(expected, ids.reshape(-1), gradients.reshape(-1, width))
  devices = len(ids)
  for (strategy, what), form in forms.items():
    found = form(*arguments)
    rows, home = (found, None) if what == FETCH else found
    agree = np.array_equal(rows, table[ids])
    if home is not None:
      dense = np.asarray(home) if strategy == "plain" else None
      if dense is None:
        dense = _dense(home, devices, table.shape)
      agree = agree and np.array_equal(dense, expected)
    if not agree:
      raise RuntimeError(f"{strategy}, {what}: not what the table holds")


def _dense(home, devices, shape):
  """[R, d] of the `RowGradients` that lie at the owners."""
  shard, dense = shape[0] // devices, np.zeros(shape, np.float32)
  row_ids = np.asarray(home.row_ids).reshape(devices, -1)
  values = np.asarray(home.values).reshape(devices, -1, shape[1])
  for owner in range(devices):
    here = row_ids[owner] < shard
    dense[owner * shard + row_ids[owner][here]] = values[owner][here]
  return dense
