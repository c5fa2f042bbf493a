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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from engram_jax.errors import first_line
from engram_jax.memory.pinned import gather_on_host
from engram_jax.memory.prefetch import read_to_device
from engram_jax.memory.quantization import FORMATS, RowFormat
from engram_jax.memory.stores import (
  Buffers,
  DeviceStore,
  HostStore,
  PackedRows,
  PinnedStore,
  RowStore,
  unpack,
)
from engram_jax.memory.table import lookup
from experiments import number_flags
from experiments.benchmarks import harness
from experiments.benchmarks.lookup_runs import draw_ids
from experiments.benchmarks.offload_runs import make_rows

#: Engram layers of V4.1.
LAYERS = (1, 14)
_unpack = jax.jit(unpack, static_argnames="row_format")

Ids = Mapping[int, np.ndarray]
Way = Callable[[Ids], dict[int, jax.Array]]


def draw(rows: int, count: int, turns: int) -> list[Ids]:
  """Zipf-distributed ids of all layers, int32 [count], others at each turn."""
  ids = draw_ids("zipf", (turns, len(LAYERS), count), rows)
  return [dict(zip(LAYERS, each)) for each in ids]


def ways(
  tables: Mapping[int, np.ndarray], row_format: RowFormat, *, device: bool
) -> tuple[dict[str, Way], dict[str, str]]:
  """Every way that this platform takes; and those it does not, with why.

  Args:
    tables: uint8 [R, n] per layer.
    row_format: of the rows.
    device: whether the tables are put on the device, too.
  """
  host, buffers = HostStore(tables, row_format), Buffers()

  def in_program(store: RowStore, gather: Callable) -> Way:
    # Arguments: what a program closes over becomes a part of it.
    @jax.jit
    def read(tables, ids):
      packed = {layer: gather(tables[layer], x) for layer, x in ids.items()}
      rows = PackedRows(packed, dict.fromkeys(packed))
      return unpack(rows, row_format)

    return functools.partial(read, store.tables)

  def sent(ids):
    packed = read_to_device(host, ids, buffers=buffers)
    return _unpack(packed, row_format=row_format)

  @jax.jit
  def callback(ids):
    shapes = {
      layer: jax.ShapeDtypeStruct(
        (*x.shape, row_format.bytes_per_row), jnp.uint8
      )
      for layer, x in ids.items()
    }

    def read(ids):
      found = host.read({layer: np.asarray(x) for layer, x in ids.items()})
      return {i: x[found.inverse[i]] for i, x in found.packed.items()}

    packed = jax.pure_callback(read, shapes, ids)
    rows = PackedRows(packed, dict.fromkeys(packed))
    return unpack(rows, row_format)

  makers = {
    "device": lambda: in_program(DeviceStore(tables, row_format), lookup),
    "pinned": lambda: in_program(
      PinnedStore(tables, row_format), gather_on_host
    ),
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


def measure(
  tables: Mapping[int, np.ndarray],
  row_format: RowFormat,
  *,
  counts: Sequence[int],
  repeats: int,
  device: bool = True,
) -> dict[str, Any]:
  """All ways in turns, by ids of a layer.

  Raises:
    RuntimeError: two ways give other numbers.
  """
  found, without = ways(tables, row_format, device=device)
  rows, points = len(tables[LAYERS[0]]), []
  for count in counts:
    # New ids at every call, the same for all ways: none is found in a cache.
    ids, *drawn = draw(rows, count, repeats + 3)
    results = {name: way(ids) for name, way in found.items()}
    first = next(iter(results))
    for name, result in results.items():
      for layer, numbers in result.items():
        if not np.array_equal(numbers, results[first][layer]):
          raise RuntimeError(f"{name}: other numbers than {first}")
    del results

    def case(way, drawn=drawn):
      turn = iter(drawn)
      return lambda: way(next(turn))

    cases = {name: case(way) for name, way in found.items()}
    times = harness.interleaved(cases, repeats=repeats)
    point = {"ids": count, "ms": {k: x["median_ms"] for k, x in times.items()}}
    if "device" in found:
      base = point["ms"]["device"]
      point["of_device"] = {k: x / base for k, x in point["ms"].items()}
    off = {k: x for k, x in point["ms"].items() if k != "device"}
    point["fastest"] = min(off, key=off.get)
    points.append(point)
  return {"points": points, "left_out": without}


def define_flags() -> None:
  harness.define_common("host_reads", repeats=15)
  flags.DEFINE_float("gib", 2.0, "Of packed rows, both layers together.")
  flags.DEFINE_enum("row_format", "fp8", FORMATS, "Of the packed rows.")
  flags.DEFINE_integer("width", 256, "Numbers of a row.", lower_bound=1)
  counts = [192, 1536, 12288, 98304]
  text = "Row ids of a layer: a token has 24 in V4.1."
  number_flags.define("ids", counts, text)
  text = "Put the tables on the device too, to compare with."
  flags.DEFINE_bool("device", True, text)


def main(argv: Sequence[str]) -> None:
  del argv
  args = flags.FLAGS
  row_format = RowFormat(args.row_format, args.width)
  size = int(args.gib * harness.GIB)
  # Host, pinned, and on the device, which may be the same memory.
  harness.require_memory("gib", args.gib, (2 + args.device) * size)
  rows = size // len(LAYERS) // row_format.bytes_per_row
  tables = make_rows(dict.fromkeys(LAYERS, rows), row_format)
  result = measure(
    tables,
    row_format,
    counts=args.ids,
    repeats=args.repeats,
    device=args.device,
  )
  device = jax.devices()[0]
  result = {
    "device": device.device_kind,
    "row_format": args.row_format,
    "width": args.width,
    "rows": rows,
    "repeats": args.repeats,
    **result,
  }
  names = list(result["points"][0]["ms"])
  header = ("ids of a layer", *(f"{name}, ms" for name in names), "fastest")
  lines = [
    [point["ids"], *point["ms"].values(), point["fastest"]]
    for point in result["points"]
  ]
  left = [f"without {k}: {why}" for k, why in result["left_out"].items()]
  harness.publish(result, [harness.aligned(header, lines), *left])


if __name__ == "__main__":
  harness.launch(define_flags, main)
