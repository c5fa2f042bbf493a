"""Compiles the training step for devices that are not here.

  python -m experiments.compile_for_pod --without_memory \
    --config=experiments/configs/memory_100b.py --topology=v5p:4x4x8 \
    --out=experiments/results/compile_for_pod_v5p.json

The whole step: sharded state, optimizers, donated buffers, rows exchanged
between chips. Nothing runs and nothing is allocated. libtpu (`pip install
libtpu`) compiles for TPUs on any Linux machine; `--topology=cpu:8` is for as
many simulated CPU devices. The program says what each chip holds, whether that
fits, what travels between chips, and XLA's estimate of the time.

What the estimate is not: a measurement. It is the sum over operations of their
time at the chip's peak rates, on-chip memory included; links between chips are
not in it. The bytes that they carry are given beside it.
"""

import dataclasses
import importlib.metadata
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental import topologies
from jax.sharding import Mesh

from engram_jax import sharding
from engram_jax.analysis import compiled as analysis
from engram_jax.analysis.accounting import count_parameters_by_part
from engram_jax.config_dicts import to_dict
from engram_jax.errors import InputError, require
from engram_jax.memory.compression import TokenCompression
from engram_jax.memory.hashing import NgramHash
from engram_jax.run_config import ExperimentConfig, MeshConfig
from engram_jax.training.program import Program
from engram_jax.training.runs import abstract_state
from engram_jax.training.state import abstract_model, flatten
from engram_jax.training.step import make_train_step
from experiments import cli
from experiments.benchmarks.harness import GIB, MIB, aligned
from experiments.results import write_result

_CONFIG = cli.define_config()
_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "A TPU slice, e.g. v5p:4x4x8 or v6e:16x16; or cpu:N."
)
_OUT = flags.DEFINE_string("out", None, "JSON file for the result.")
_WITHOUT = flags.DEFINE_bool(
  "without_memory", False, "Compile the same model without a memory too."
)
flags.mark_flags_as_required(["config", "topology"])

#: Memory of one chip in GiB, by Google's pages of the TPU generations. The
#: compiler itself leaves some hundred MiB of it to the runtime.
HBM_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}

#: For libtpu where there is no TPU: not to look for one, and not to complain
#: that it knows of none; and several processes may compile at a time. The
#: topology compiled for is an argument, and does not come from here.
ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5p-8",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

#: Arrays and collectives named one by one.
LISTED = 5


# --- devices ---


def devices_of(topology: str) -> Sequence[jax.Device]:
  """The devices of `--topology`.

  Raises:
    InputError: a topology that there is not, or libtpu is missing.
  """
  generation, _, size = topology.partition(":")
  known = [f"{name}:SHAPE" for name in HBM_GIB]
  valid = f"cpu:N, or one of {', '.join(known)}, e.g. v5p:4x4x8"
  require(generation in ("cpu", *HBM_GIB) and size, "topology", topology, valid)
  if generation == "cpu":
    ok = size.isdecimal() and int(size) > 1
    require(ok, "topology", topology, "cpu:N with N of 2 or more")
    jax.config.update("jax_num_cpu_devices", int(size))
    return jax.devices("cpu")
  try:
    importlib.metadata.version("libtpu")
  except importlib.metadata.PackageNotFoundError:
    valid = "cpu:N; for a TPU `pip install libtpu`, which compiles for it"
    raise InputError("topology", f"{topology} without libtpu", valid) from None
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  try:
    return topologies.get_topology_desc(
      platform="tpu", topology_name=topology
    ).devices
  except jax.errors.JaxRuntimeError as error:
    valid = f"a whole slice of {generation} ({_first_line(error)})"
    raise InputError("topology", topology, valid) from None


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device]) -> Mesh:
  """`sharding.make_mesh` for two devices or more."""
  mesh = sharding.make_mesh(config, devices=devices)
  require(mesh is not None, "topology", "one device", "two devices or more")
  return mesh


# --- the step ---


def make_program(config: ExperimentConfig, mesh: Mesh) -> Program:
  """The training program; its hash is over raw token ids, without tokenizer."""
  memory, hashing, compression = config.model.engram, None, None
  if memory is not None:
    compression = TokenCompression.identity(config.model.vocab_size)
    hashing = NgramHash.create(
      vocab_size=compression.size,
      rows_per_head=memory.rows_per_head,
      heads=memory.heads,
      layers=memory.layers,
      pad_id=memory.pad_id,
      seed=memory.seed,
    )
  graph, _, _ = abstract_model(config.model)
  return Program.create(
    config.model,
    config.train,
    graph,
    hashing=hashing,
    compression=compression,
    mesh=mesh,
    mesh_config=config.mesh,
  )


def abstract_batch(config: ExperimentConfig, mesh: Mesh) -> dict[str, Any]:
  """Shapes, dtypes and shardings of a batch."""
  dtypes = {
    "inputs": jnp.int32,
    "targets": jnp.int32,
    "breaks": jnp.int8,
    "loss_mask": jnp.bool_,
  }
  shape = (config.train.batch_size, config.train.seq_len)
  placed = sharding.batch_sharding(mesh)
  return {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    for name, dtype in dtypes.items()
  }


def bytes_per_device(leaf: Any) -> int:
  """Bytes of an array's part on one device, before any padding in memory."""
  shape = leaf.sharding.shard_shape(leaf.shape)
  return math.prod(shape) * np.dtype(leaf.dtype).itemsize


def compile_step(
  config: ExperimentConfig, mesh: Mesh, *, platform: str
) -> dict[str, Any]:
  """Compiles the step and reads off what it says.

  Args:
    config: the run.
    mesh: of the devices to compile for.
    platform: theirs, `tpu` or `cpu`.

  Returns:
    The figures, ready for JSON. `fits` is the compiler's own word, with
    `refusal` in its words; a program that it refuses has no figures beyond the
    arguments.
  """
  program = make_program(config, mesh)
  state, batch = abstract_state(program), abstract_batch(config, mesh)
  capacity = program.capacity(batch).rows
  leaves = {
    name: bytes_per_device(leaf)
    for name, leaf in flatten(state).items()
    if leaf.size
  }
  parts: dict[str, int] = {}
  for name, size in leaves.items():
    part = name.split("/")[0]
    parts[part] = parts.get(part, 0) + size
  parameters = count_parameters_by_part(config.model, program.hashing)
  result = {
    "parameters": {
      name: parameters[name] for name in ("total", "tables", "activated")
    },
    "state_bytes": parts,
    "largest_arrays": dict(
      sorted(leaves.items(), key=lambda item: -item[1])[:LISTED]
    ),
    "lookup_capacity": capacity,
  }

  step = make_train_step(program, capacity=capacity)
  lowered = step.trace(state, batch).lower(lowering_platforms=(platform,))
  start = time.perf_counter()
  try:
    executable = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return {**result, "fits": False, "refusal": _first_line(error)}
  listing = executable.as_text()
  sent = analysis.collectives(listing)

  def of_tables(records):
    tables = [table.shape for table in state.tables.values()]
    return [
      _named(record)
      for rows, width in dict.fromkeys(tables)
      for record in analysis.of_table(
        records, rows=rows, width=width, devices=mesh.size
      )
    ]

  return {
    **result,
    "fits": True,
    "compile_seconds": time.perf_counter() - start,
    "memory": analysis.memory_report(executable),
    "cost": analysis.cost(executable),
    "collectives": {
      "bytes": analysis.collective_bytes(sent),
      "operations": analysis.collective_counts(sent),
      "in_loops": sum(record.count for record in sent if record.in_loop),
      "largest": [_named(record) for record in sent[:LISTED]],
      "of_tables": of_tables(sent),
    },
    "copies_of_tables": of_tables(analysis.copies(listing)),
  }


def _named(record: analysis.Movement) -> dict[str, Any]:
  """For JSON; of the arrays that XLA joined, the largest and their number."""
  record = record._asdict()
  return {**record, "arrays": len(record["arrays"])}


def _first_line(error: Exception) -> str:
  return " ".join(str(error).split("\n", 1)[0].split())


# --- the report ---


def measure(
  config: ExperimentConfig, topology: str, *, without_memory: bool
) -> dict[str, Any]:
  """Compiles for `topology`, with and, if asked, without the memory."""
  devices = devices_of(topology)
  mesh = make_mesh(config.mesh, devices)
  sharding.require_fit(config, mesh)
  valid = "a memory: without_memory compares with and without"
  compared = config.model.engram is not None or not without_memory
  require(compared, "model.engram", None, valid)
  generation = topology.partition(":")[0]
  platform = "cpu" if generation == "cpu" else "tpu"
  configs = {"as configured": config}
  if without_memory:
    model = dataclasses.replace(config.model, engram=None)
    plain = dataclasses.replace(config, model=model)
    configs = {"with memory": config, "without": plain}
  programs = {}
  for name, each in configs.items():
    print(f"compiling for {topology}, {name} ...", flush=True)
    programs[name] = compile_step(each, mesh, platform=platform)
  result = {
    "topology": topology,
    "device_kind": devices[0].device_kind,
    "devices": len(devices),
    "mesh": dict(mesh.shape),
    "hbm_gib": HBM_GIB.get(generation),
    "libtpu": platform == "tpu" and importlib.metadata.version("libtpu"),
    "config": to_dict(config),
    "programs": programs,
  }
  seconds = [
    program["cost"]["optimal_seconds"]
    for program in programs.values()
    if program["fits"]
  ]
  if len(seconds) == 2 and all(seconds):
    result["optimal_seconds_ratio"] = seconds[0] / seconds[1]
  return result


def text(result: Mapping[str, Any]) -> str:
  """The result for the terminal."""
  programs = result["programs"]
  rows: list[list[Any]] = []

  def add(name, *keys, unit=1):
    values = []
    for program in programs.values():
      for key in keys:
        program = program and program.get(key)
      values.append(program)
    if any(values):
      rows.append([name, *(v if v is None else v / unit for v in values)])

  unit, name = (GIB, "GiB") if result["hbm_gib"] else (MIB, "MiB")
  add("parameters, millions", "parameters", "total", unit=1e6)
  add("  of them in tables", "parameters", "tables", unit=1e6)
  for part in ("params", "opt_state", "tables", "table_states"):
    add(f"state: {part}, {name}", "state_bytes", part, unit=unit)
  for part in ("argument", "temp", "peak", "total"):
    add(f"memory: {part}, {name}", "memory", part, unit=unit)
  for kind in analysis.COLLECTIVES:
    add(f"{kind}, {name}", "collectives", "bytes", kind, unit=unit)
    add("  operations", "collectives", "operations", kind)
  add("TFLOP", "cost", "flops", unit=1e12)
  add("XLA's estimate, ms", "cost", "optimal_seconds", unit=1e-3)
  add("compilation, s", "compile_seconds")
  mesh = ", ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
  head = f"{result['topology']}: {result['devices']} devices, mesh {mesh}"
  lines = [head, "", aligned(["per device", *programs], rows)]
  for name, program in programs.items():
    lines += ["", *_verdict(name, program, result["hbm_gib"])]
  ratio = result.get("optimal_seconds_ratio")
  if ratio:
    lines += ["", f"XLA's estimate with over without memory: {ratio:.3f}"]
  return "\n".join(lines)


def _verdict(
  name: str, program: Mapping[str, Any], hbm: int | None
) -> Iterable[str]:
  """Whether it fits and what fills it; what the largest message is."""
  largest, size = next(iter(program["largest_arrays"].items()))
  held = sum(program["state_bytes"].values())
  cause = f"largest array {largest}, {_size(size)} of {_size(held)} of state"
  if not program["fits"]:
    yield f"{name}: DOES NOT FIT in {hbm} GiB; {cause}"
    yield f"  the compiler: {program['refusal']}"
    return
  # XLA's peak for CPUs has no temporaries in it.
  takes = _size(program["memory"]["peak" if hbm else "total"])
  takes += f" of {hbm} GiB: fits" if hbm else ""
  yield f"{name}: {takes}; {cause}"
  sent = program["collectives"]
  for record in sent["largest"][:1]:
    shape = ",".join(map(str, record["shape"]))
    array = f"{record['dtype']}[{shape}]"
    yield (
      f"  largest collective: {record['kind']} of {_size(record['bytes'])}, "
      f"{array if record['arrays'] == 1 else f'largest part {array}'}"
    )
  if hbm and program["cost"]["optimal_seconds"] is None:
    yield "  XLA gives no usable estimate of the time"
  if sent["in_loops"]:
    yield f"  {sent['in_loops']} collectives are in loops, counted once each"
  if program["parameters"]["tables"]:
    moved = (sent["of_tables"], program["copies_of_tables"])
    counts = [sum(record["count"] for record in records) for records in moved]
    yield (
      f"  tables or parts of them: {counts[0]} sent between devices, "
      f"{counts[1]} copied within one"
    )


def _size(count: int) -> str:
  return (
    f"{count / GIB:.2f} GiB" if count > GIB / 10 else f"{count / MIB:.1f} MiB"
  )


def main(argv: Sequence[str]) -> None:
  del argv
  if not jax.config.jax_platforms:
    # The device compiled for is not one that runs here.
    jax.config.update("jax_platforms", "cpu")
  result = measure(
    cli.frozen(_CONFIG.value), _TOPOLOGY.value, without_memory=_WITHOUT.value
  )
  print(f"\n{text(result)}")
  if _OUT.value:
    write_result(_OUT.value, result)
    print(f"written to {_OUT.value}")


if __name__ == "__main__":
  cli.run(main)
