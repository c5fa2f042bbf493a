"""The inference step with its tables in a TPU's host memory, compiled.

  python -m experiments.benchmarks.pinned_tpu
  python -m experiments.benchmarks.pinned_tpu --presets=medium \
    --topologies=v6e:2x2

One program is a whole step of decoding, of a chunk of a prompt or of one token
each, on one chip of the topology:

  hash, gather of packed rows, unpack, model

The packed tables are its arguments, in one of two homes: the chip's memory, or
pinned host memory, where the host's processor gathers the rows in the midst of
the program. Nothing runs and nothing is allocated; libtpu (`pip install
libtpu`) compiles on any Linux machine. The figures are the compiler's: what the
program's arguments and temporaries take on the chip and on the host.

To reach: with pinned tables every step compiles, the arguments on the host are
the tables' bytes, and no table is copied. Whether tables in the chip's memory
fit is told beside it. Weights are as decoders have them
(`decoding/weights.py`).
"""

import functools
import importlib.metadata
import itertools
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format
from jax.sharding import Sharding

from engram_jax.analysis import compiled as analysis
from engram_jax.decoding.decoders import Decoded, lookup_chunk
from engram_jax.decoding.forward import lower_blocks, upper_blocks
from engram_jax.decoding.state import DecodeState, init_state
from engram_jax.decoding.weights import DecodingModel, for_decoding
from engram_jax.memory.memory import Memory
from engram_jax.presets import Preset
from engram_jax.presets import preset as find_preset
from engram_jax.stores.pinned import pinned_format
from engram_jax.stores.program_stores import (
  DeviceStore,
  PinnedStore,
  ProgramStore,
)
from engram_jax.stores.quantization import RowFormat
from engram_jax.training.setup import TrainSetup
from experiments.benchmarks import harness, models
from experiments.compile_for_pod import HBM_GIB, devices_of

#: The stores by home.
STORES = {"device": DeviceStore, "pinned": PinnedStore}
#: An untiled table is rounded up to so many bytes.
ROUNDED = 1024


@functools.partial(jax.jit, static_argnames="memory", donate_argnames="state")
def step(
  model: DecodingModel,
  memory: Memory,
  store: ProgramStore,
  state: DecodeState,
  token_ids: jax.Array,
  lengths: jax.Array,
) -> Decoded:
  """A whole step of decoding as one program; token ids [B, L], lengths [B]."""
  rows, history = lookup_chunk(store, memory, state.history, token_ids, lengths)
  streams, cache = lower_blocks(model, state.cache, token_ids)
  logits, cache = upper_blocks(model, streams, cache, rows, lengths)
  return logits, DecodeState(cache, history)


def abstract_store(
  memory: Memory, row_format: RowFormat, *, home: str, place: Format | Sharding
) -> ProgramStore:
  """A store of shapes, of the memory's size and in this place."""
  size = row_format.bytes_per_row
  one = np.zeros((1, size), np.uint8)
  store = STORES[home](dict.fromkeys(memory.layers, one), row_format)
  shapes = {
    layer: jax.ShapeDtypeStruct((rows, size), jnp.uint8, sharding=place)
    for layer, rows in memory.num_rows.items()
  }
  return jax.tree.unflatten(jax.tree.structure(store), jax.tree.leaves(shapes))


def abstract_arguments(
  setup: TrainSetup,
  row_format: RowFormat,
  *,
  home: str,
  device: jax.Device,
  batch: int,
  tokens: int,
  capacity: int,
) -> tuple[Any, ...]:
  """Shapes, dtypes and places of a step's arguments on one device."""
  memory, there = setup.memory, pinned_format(device)
  here = there.sharding.with_memory_kind("device")
  state = setup.abstract_state()
  model = jax.eval_shape(for_decoding, setup.merge_model(state))
  state = jax.eval_shape(
    lambda model: init_state(model, memory, batch=batch, capacity=capacity),
    model,
  )
  ids = jax.ShapeDtypeStruct((batch, tokens), jnp.int32)
  lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
  model, state, ids, lengths = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
    (model, state, ids, lengths),
  )
  place = there if home == "pinned" else here
  store = abstract_store(memory, row_format, home=home, place=place)
  return model, memory, store, state, ids, lengths


def bytes_of(tree: Any) -> int:
  return sum(x.size * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def compile_step(
  config: Preset,
  *,
  device: jax.Device,
  home: str,
  tokens: int,
  batch: int,
  capacity: int,
  row_format: str,
) -> dict[str, Any]:
  """Compiles one step, and reads off what it takes.

  Args:
    config: a model with a memory, and its training.
    device: to compile for.
    home: where the tables lie and how they are gathered, one of `STORES`.
    tokens: L.
    batch: B.
    capacity: tokens of one sequence in the cache.
    row_format: format of the packed rows.

  Returns:
    `model_bytes`, `tables_bytes` and `state_bytes` as they are; `fits`, the
    compiler's word, with its `refusal`; else `memory` on the device (its
    `peak` with the host's arguments) and `host_memory`, in bytes, and how many
    `copies_of_tables` on the device each step makes.
  """
  setup = models.make_setup(config.model, config.train)
  arguments = abstract_arguments(
    setup,
    RowFormat(row_format, config.model.engram.head_dim),
    home=home,
    device=device,
    batch=batch,
    tokens=tokens,
    capacity=capacity,
  )
  model, _, store, state, *_ = arguments
  found = {
    "home": home,
    "tokens": tokens,
    "model_bytes": bytes_of(model),
    "state_bytes": bytes_of(state),
    "tables_bytes": bytes_of(store),
  }
  lowered = step.trace(*arguments).lower(lowering_platforms=(device.platform,))
  start = time.perf_counter()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    refusal = " ".join(str(error).split("\n", 1)[0].split())
    return {**found, "fits": False, "refusal": refusal}
  seconds = time.perf_counter() - start
  memory, listing = compiled.memory_analysis(), compiled.as_text()
  copies = analysis.copies(listing)
  host = ("argument", "output", "alias", "temp")
  return {
    **found,
    "fits": True,
    "compile_seconds": seconds,
    "memory": analysis.memory_report(compiled),
    "host_memory": {
      name: int(getattr(memory, f"host_{name}_size_in_bytes")) for name in host
    },
    "copies_of_tables": sum(
      len(analysis.of_table(copies, rows=rows, width=width, devices=1))
      for rows, width in {table.shape for table in store.tables.values()}
    ),
  }


def holds_tables(record: Mapping[str, Any], tables: int) -> bool:
  """Whether the arguments on the host are that many tables and nothing else."""
  more = record["host_memory"]["argument"] - record["tables_bytes"]
  return 0 <= more < ROUNDED * tables


def measure(
  *, presets: Sequence[str], topologies: Sequence[str], chunk: int, **sizes: Any
) -> harness.Figures:
  """Both homes, a chunk and a token, on one chip; arguments as the flags."""
  if not jax.config.jax_platforms:
    # The device compiled for is not one that runs here.
    jax.config.update("jax_platforms", "cpu")
  # What does not fit is told below; libtpu would list all of it.
  os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
  records = []
  for preset, topology in itertools.product(presets, topologies):
    device, config = devices_of(topology)[0], find_preset(preset)
    hbm = HBM_GIB.get(topology.partition(":")[0])
    about = {"preset": preset, "topology": topology, "hbm_gib": hbm}
    about["device_kind"] = device.device_kind
    for tokens, home in itertools.product((chunk, 1), STORES):
      print(f"{topology}, {preset}, {home}, {tokens} tokens ...", flush=True)
      record = compile_step(
        config, device=device, home=home, tokens=tokens, **sizes
      )
      if home == "pinned" and record["fits"]:
        count = len(config.model.engram.layers)
        record["host_holds_tables"] = holds_tables(record, count)
      records.append(about | record)
  version = importlib.metadata.version("libtpu")
  return {"libtpu": version, "verdict": verdict(records), "records": records}


def verdict(records: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
  """Whether the aims are reached."""
  pinned = [r for r in records if r["home"] == "pinned"]
  fitting = [r for r in pinned if r["fits"]]
  return {
    "every_pinned_step_compiles": len(fitting) == len(pinned),
    "host_holds_tables": all(r["host_holds_tables"] for r in fitting),
    "no_table_is_copied": not any(r["copies_of_tables"] for r in fitting),
  }


def tables(result: harness.Figures) -> list[str]:
  def gib(*path: str):
    def read(record):
      for key in path:
        record = record.get(key) if record else None
      return None if record is None else f"{record / harness.GIB:.3f}"

    return read

  columns = {
    "model": "preset",
    "chip": lambda r: r["topology"].partition(":")[0],
    "tokens": "tokens",
    "tables in": "home",
    "tables": gib("tables_bytes"),
    "weights": gib("model_bytes"),
    "cache": gib("state_bytes"),
    "fits": lambda r: f"{'yes' if r['fits'] else 'NO'}, {r['hbm_gib']}",
    "arguments": gib("memory", "argument"),
    "temp": gib("memory", "temp"),
    "host arguments": gib("host_memory", "argument"),
    "host temp": gib("host_memory", "temp"),
    "copied": "copies_of_tables",
    "compile s": "compile_seconds",
  }
  records = result["records"]
  refused = [
    f"{r['preset']} on {r['topology']}, {r['tokens']} tokens, {r['home']}: "
    f"{r['refusal']}"
    for r in records
    if not r["fits"]
  ]
  aims = [f"{name}: {value}" for name, value in result["verdict"].items()]
  found = harness.table(columns, records, title="GiB")
  return ["\n".join([found, *refused]), "\n".join(aims)]


FLAGS = {
  "presets": (["medium", "v41_memory"], "Models with a memory."),
  "topologies": (["v5p:2x2x1", "v6e:2x2"], "TPU slices; a chip of each."),
  "row_format": ("fp8", "Of the packed rows."),
  "batch": (8, "Sequences."),
  "chunk": (256, "Tokens of a chunk."),
  "capacity": (4096, "Tokens of a sequence in the cache."),
}
BENCHMARK = harness.Benchmark(measure, tables, FLAGS)

if __name__ == "__main__":
  harness.run(BENCHMARK)
