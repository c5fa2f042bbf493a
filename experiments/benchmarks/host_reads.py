"""Rows from host memory to the device: which way there is the fastest.

  python -m experiments.benchmarks.host_reads
  python -m experiments.benchmarks.host_reads --gib=40

One step's rows of all layers, from ids to numbers on the device, in turns:

  device      the tables lie on the device: what the others are compared with
  pinned      a gather on the host inside the program (`PinnedStore`)
  sent        NumPy reads each distinct row once, device_put (`HostStore`)
  callback    the program asks NumPy: `jax.pure_callback` of the same reads

All must give the same numbers. The ids are Zipf-distributed over the rows. A
way that a platform does not take is left out, and the JSON says why. On a
machine without an accelerator the device's memory is the host's: the figures
are then of what each way costs besides the way itself.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.errors import first_line
from engram_jax.memory.table import lookup
from engram_jax.stores.host_stores import HostStore
from engram_jax.stores.pinned import gather_on_host
from engram_jax.stores.prefetch import read_to_device
from engram_jax.stores.program_stores import DeviceStore, PinnedStore
from engram_jax.stores.quantization import RowFormat
from engram_jax.stores.store import Buffers, PackedRows, unpack
from experiments.benchmarks import fixtures, harness

#: Engram layers of V4.1.
LAYERS = (1, 14)
FLAGS = {
  "gib": (2.0, "Of packed rows, both layers together."),
  "row_format": ("fp8", "Of the packed rows."),
  "width": (256, "Numbers of a row."),
  "ids": ([192, 1536, 12288, 98304], "Of a layer: a token has 24 in V4.1."),
  "device": (True, "Put the tables on the device too, to compare with."),
  "repeats": (15, "Timed calls of each way."),
}

Ids = Mapping[int, np.ndarray]
Way = Callable[[Ids], dict[int, jax.Array]]


def ways(
  tables: Mapping[int, np.ndarray], row_format: RowFormat, *, device: bool
) -> tuple[dict[str, Way], dict[str, str]]:
  """Every way that this platform takes; and those it does not, with why.

  Args:
    tables: uint8 [R, n] per layer.
    row_format: format of the rows.
    device: whether the tables are put on the device, too.
  """
  host, buffers = HostStore(tables, row_format), Buffers()
  numbers = jax.jit(unpack, static_argnames="row_format")

  def in_program(make_store: Callable, gather: Callable) -> Way:
    # Arguments: what a program closes over becomes a part of it.
    @jax.jit
    def read(tables, ids):
      packed = {layer: gather(tables[layer], x) for layer, x in ids.items()}
      return unpack(PackedRows(packed, dict.fromkeys(packed)), row_format)

    return functools.partial(read, make_store(tables, row_format).tables)

  def sent(ids):
    packed = read_to_device(host, ids, buffers=buffers)
    return numbers(packed, row_format=row_format)

  @jax.jit
  def callback(ids):
    size = row_format.bytes_per_row
    shapes = {
      layer: jax.ShapeDtypeStruct((*x.shape, size), jnp.uint8)
      for layer, x in ids.items()
    }

    def read(ids):
      found = host.read({layer: np.asarray(x) for layer, x in ids.items()})
      return {i: x[found.inverse[i]] for i, x in found.packed.items()}

    packed = jax.pure_callback(read, shapes, ids)
    return unpack(PackedRows(packed, dict.fromkeys(packed)), row_format)

  makers = {
    "device": lambda: in_program(DeviceStore, lookup),
    "pinned": lambda: in_program(PinnedStore, gather_on_host),
    "sent": lambda: sent,
    "callback": lambda: callback,
  }
  if not device:
    del makers["device"]
  found, without = {}, {}
  probe = {layer: np.zeros(8, np.int32) for layer in LAYERS}
  for name, make in makers.items():
    try:
      way = make()
      jax.block_until_ready(way(probe))
    except Exception as error:  # whatever a platform's compiler says
      without[name] = f"{type(error).__name__}: {first_line(error)[:200]}"
    else:
      found[name] = way
  return found, without


def _next(way: Way, turns: Iterator[Ids]) -> dict[int, jax.Array]:
  return way(next(turns))


def compare(
  tables: Mapping[int, np.ndarray],
  row_format: RowFormat,
  *,
  ids: Sequence[int],
  repeats: int,
  device: bool = True,
) -> harness.Figures:
  """All ways in turns, by ids of a layer.

  Raises:
    RuntimeError: two ways give other numbers.
  """
  found, without = ways(tables, row_format, device=device)
  rows, points = len(tables[LAYERS[0]]), []
  for count in ids:
    # New ids at every call, the same for all ways: none is found in a cache.
    drawn = fixtures.draw_ids("zipf", (repeats + 3, len(LAYERS), count), rows)
    first, *turns = [dict(zip(LAYERS, each)) for each in drawn]
    results = {name: way(first) for name, way in found.items()}
    expected = next(iter(results))
    for name, result in results.items():
      same = map(np.array_equal, result.values(), results[expected].values())
      if not all(same):
        raise RuntimeError(f"{name}: other numbers than {expected}")
    del results
    cases = {
      name: functools.partial(_next, way, iter(turns))
      for name, way in found.items()
    }
    times = harness.interleaved(cases, repeats=repeats)
    ms = {name: x["median_ms"] for name, x in times.items()}
    fastest = min((name for name in ms if name != "device"), key=ms.get)
    points.append({"ids": count, "ms": ms, "fastest": fastest})
  return {"points": points, "left_out": without}


def measure(
  *, gib: float, row_format: str, width: int, device: bool, **options
) -> harness.Figures:
  """The tables, and `compare`; arguments as the flags."""
  rows, size = RowFormat(row_format, width), int(gib * harness.GIB)
  # Host, pinned, and on the device, which may be the same memory.
  harness.require_memory("gib", gib, (2 + device) * size)
  count = size // len(LAYERS) // rows.bytes_per_row
  made = fixtures.make_rows(dict.fromkeys(LAYERS, count), rows)
  return {"rows": count, **compare(made, rows, device=device, **options)}


def tables(result: harness.Figures) -> list[str]:
  columns = {"ids of a layer": "ids"}
  columns |= {f"{k}, ms": f"ms.{k}" for k in result["points"][0]["ms"]}
  columns["fastest"] = "fastest"
  left = [f"without {k}: {why}" for k, why in result["left_out"].items()]
  return [harness.table(columns, result["points"]), *left]


BENCHMARK = harness.Benchmark(measure, tables, FLAGS)

if __name__ == "__main__":
  harness.run(BENCHMARK)
