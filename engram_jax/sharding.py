"""Devices as a mesh, and which axis of an array lies along which of its axes.

  replica  splits the batch
  data     splits the batch too, and every parameter with its optimizer's state
  expert   splits the batch too, and the routed experts
  tensor   splits the hidden width of experts and dense blocks

A table's rows lie along all four, so that every device holds an equal share of
the memory whatever the mesh is used for. This is the only file that names mesh
axes. Everything works without a mesh: then nothing here does anything.
"""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from engram_jax.errors import require
from engram_jax.run_config import ExperimentConfig, MeshConfig

AXES = ("replica", "data", "expert", "tensor")
REPLICA, DATA, EXPERT, TENSOR = AXES
#: What the batch is split over.
BATCH = (REPLICA, DATA, EXPERT)
#: Rows of a table, and of their optimizer's state.
TABLE = P(AXES)
#: An array [B, L, ...] of the model.
TOKENS = P(BATCH)
#: On every device.
WHOLE = P()
#: The embedding and the head, [V, D].
VOCABULARY = P(DATA)
#: An array [B, L, ...] of the retrieval: the devices of a tensor group, which
#: hold the same tokens, ask for different rows.
LOOKUPS = P(BATCH, TENSOR)

#: Parameters by the end of their name; n counts blocks. Along `data` they are
#: gathered to compute with. An axis that a size does not divide by is left out,
#: and what no rule names is on every device. The axes are split that come
#: first: what a TPU has in its last two would have to fall on tiles of 8 x 128.
EXPERT_RULES: tuple[tuple[str, P], ...] = (
  # [n, E, D, F] and [n, E, F, D].
  (r"moe_blocks/ffn/(gate|up)$", P(None, EXPERT, DATA, TENSOR)),
  (r"moe_blocks/ffn/down$", P(None, EXPERT, (TENSOR, DATA))),
)
PARAMETER_RULES: tuple[tuple[str, P], ...] = (
  *EXPERT_RULES,
  # SwiGLU of dense blocks and of shared experts: [n, D, F] and [n, F, D].
  (r"(dense_blocks/ffn|shared)/(gate|up)$", P(None, DATA, TENSOR)),
  (r"(dense_blocks/ffn|shared)/down$", P(None, (TENSOR, DATA))),
  # Along what is a matrix's first axis: D, the latent's width, heads, G * D.
  (r"blocks/attention/[a-z_]+$", P(None, DATA)),
  (r"_streams/kernel$", P(None, DATA)),
  # [M, G + 1, D].
  (r"engrams/\d+/projection$", P(DATA)),
  (r"(embedding/table|head)$", VOCABULARY),
)
#: Parameters that are used in float32 whatever the compute dtype.
IN_FLOAT32 = r"(scale|bias|router|_streams/kernel)$"


# --- the mesh ---


def make_mesh(
  config: MeshConfig,
  *,
  devices: Sequence[jax.Device] | None = None,
  axis_type: AxisType = AxisType.Auto,
) -> Mesh | None:
  """The mesh of `config`, or None for a single device.

  Args:
    config: sizes of the axes; `data = 0` is what the others leave.
    devices: all of the run's, by default.
    axis_type: `Auto` lets XLA place what is not said, as the programs here do;
      `Explicit` has every array's sharding in its type. The memory works with
      both.

  Raises:
    InputError: axes that do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  count = len(devices)
  sizes = {axis: getattr(config, axis) for axis in AXES}
  given = {axis: n for axis, n in sizes.items() if n}
  product = math.prod(given.values())
  name = " * ".join(f"mesh.{axis}" for axis in given)
  if len(given) == len(AXES):
    valid = f"the number of devices, {count}; data = 0 takes what is left"
    require(product == count, name, product, valid)
  valid = f"a divisor of the number of devices, {count}"
  require(count % product == 0, name, product, valid)
  shape = tuple(n or count // product for n in sizes.values())
  if count == 1:
    return None
  types = (axis_type,) * len(AXES)
  # As jax.make_mesh, which splits a physical axis of a pod over two of the
  # mesh's on some generations only.
  grid = mesh_utils.create_device_mesh(
    shape, devices, allow_split_physical_axes=True
  )
  return Mesh(grid, AXES, axis_types=types)


def current_mesh() -> AbstractMesh | None:
  """The mesh that this code is traced for; None without one of ours."""
  mesh = jax.sharding.get_abstract_mesh()
  known = not mesh.empty and set(AXES) <= set(mesh.axis_names)
  return mesh if known else None


def use(mesh: Mesh | AbstractMesh | None) -> contextlib.AbstractContextManager:
  """Traces what is called inside for this mesh; see `current_mesh`."""
  if mesh is None:
    return contextlib.nullcontext()
  abstract = mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh
  return jax.sharding.use_abstract_mesh(abstract)


def size(mesh: Mesh | AbstractMesh | None, *axes: str) -> int:
  """Number of devices along `axes`, all if none is named; 1 without a mesh."""
  if mesh is None:
    return 1
  return math.prod(mesh.shape[axis] for axis in axes or AXES)


def is_explicit(mesh: Mesh | AbstractMesh | None) -> bool:
  """Whether arrays carry their shardings in their types."""
  if mesh is None:
    return False
  return all(kind == AxisType.Explicit for kind in mesh.axis_types)


def constrain(x: Array, spec: P) -> Array:
  """`x` laid out as `spec` on the current mesh; `x` itself without one."""
  mesh = current_mesh()
  if mesh is None:
    return x
  if is_explicit(mesh):
    return jax.sharding.reshard(x, spec)
  return jax.lax.with_sharding_constraint(x, spec)


def require_fit(
  config: ExperimentConfig, mesh: Mesh | AbstractMesh | None
) -> None:
  """Refuses a run whose sizes the mesh does not divide.

  Raises:
    InputError: the first field that does not fit.
  """
  if mesh is None:
    return
  train, model = config.train, config.model
  batch, experts = size(mesh, *BATCH), size(mesh, EXPERT)
  tensor = size(mesh, TENSOR)

  def divides(field: str, value: int, by: int, axes: str):
    valid = f"a multiple of {axes} = {by}"
    require(value % by == 0, field, value, valid)

  name = "train.batch_size / train.accumulation"
  rows = train.batch_size // train.accumulation
  divides(name, rows, batch, "mesh.replica * mesh.data * mesh.expert")
  divides("train.seq_len", train.seq_len, tensor, "mesh.tensor")
  divides("model.dense_size", model.dense_size, tensor, "mesh.tensor")
  moe = model.moe
  if moe is None:
    valid = "1 for a model without experts"
    require(experts == 1, "mesh.expert", experts, valid)
    return
  divides("model.moe.num_experts", moe.num_experts, experts, "mesh.expert")
  divides("model.moe.expert_size", moe.expert_size, tensor, "mesh.tensor")
  ok = moe.dispatch != "ragged" or experts == 1
  valid = f"bucketed or dropless with mesh.expert = {experts}"
  require(ok, "model.moe.dispatch", moe.dispatch, valid)


# --- parameters inside shard_map ---


def gathered(x: Array, spec: P, *, dtype: Any) -> Array:
  """A parameter inside `shard_map`, whole along `data`.

  It travels in `dtype` and is given in its own, in which its gradient is then
  summed, first on the device and then over all that split the batch.

  Args:
    x: this device's part.
    spec: how the parameter is split.
    dtype: the compute dtype; cast the result to it to compute.
  """
  names = [entry if isinstance(entry, tuple) else (entry,) for entry in spec]
  whole = tuple(a for a in BATCH if all(a not in entry for entry in names))
  x = jax.lax.pcast(x, whole, to="varying")
  split = [i for i, entry in enumerate(names) if DATA in entry]
  return _gather(x, split[0], dtype) if split else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x, axis, dtype):
  whole = jax.lax.all_gather(x.astype(dtype), DATA, axis=axis, tiled=True)
  return whole.astype(x.dtype)


def _gather_forward(x, axis, dtype):
  return _gather(x, axis, dtype), None


def _gather_backward(axis, dtype, _, gradient):
  del dtype
  return (
    jax.lax.psum_scatter(gradient, DATA, scatter_dimension=axis, tiled=True),
  )


_gather.defvjp(_gather_forward, _gather_backward)


# --- tables ---


def padded_rows(num_rows: int, devices: int) -> int:
  """Rows of a table that `devices` share equally: the last ones stay unused."""
  return -(-num_rows // devices) * devices


# --- placing a state and its batches ---


def state_shardings(state: Any, mesh: Mesh | None) -> Any:
  """A tree like `state`, a `TrainState`, with the sharding of each leaf.

  Args:
    state: arrays, or their shapes.
    mesh: None gives None: on the default device.
  """
  if mesh is None:
    return None

  def of_table(rows: int, tree: Any):
    return jax.tree.map(
      lambda leaf: NamedSharding(mesh, table_spec(leaf, rows)), tree
    )

  rows = {i: table.shape[0] for i, table in state.tables.items()}
  placed = jax.tree_util.tree_map_with_path(
    lambda path, leaf: NamedSharding(mesh, parameter_spec(path, leaf, mesh)),
    state,
  )
  return dataclasses.replace(
    placed,
    tables={i: of_table(rows[i], x) for i, x in state.tables.items()},
    table_states={
      i: of_table(rows[i], x) for i, x in state.table_states.items()
    },
  )


def table_spec(leaf: Any, rows: int) -> P:
  """How a table of `rows` rows, or an array of its optimizer's state, is split.

  An array of such a state has one entry a row, or stands for the whole table.
  """
  return TABLE if leaf.ndim and leaf.shape[0] == rows else P()


def parameter_spec(
  path: Sequence[Any], leaf: Any, mesh: Mesh | AbstractMesh
) -> P:
  """How a parameter, or the optimizer's array of its name, is split."""
  name = parameter_name(path)
  for pattern, spec in PARAMETER_RULES:
    if re.search(pattern, name):
      return fitting(spec, leaf.shape, mesh)
  return P()


def parameter_name(path: Sequence[Any]) -> str:
  """The path of a leaf as `moe_blocks/ffn/gate`."""
  name = jax.tree_util.keystr(tuple(path), simple=True, separator="/")
  return name.removesuffix("/value")  # an nnx.Variable's own field


def fitting(spec: P, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
  """`spec` without the axes that do not divide the sizes of `shape`."""
  if len(shape) < len(spec):
    return P()  # a number that an optimizer keeps of the whole array

  def fit(axes, length):
    axes = (axes,) if isinstance(axes, str) else axes or ()
    while axes and length % size(mesh, *axes):
      axes = axes[:-1]
    return axes[0] if len(axes) == 1 else axes or None

  return P(*(fit(axes, length) for axes, length in zip(spec, shape)))


def for_compute(weights: Any, name: str, *, dtype: str) -> Any:
  """One block's weights where the block is computed: whole, in `dtype`.

  Cast before it travels. Routed experts stay as they are: they are gathered by
  whoever computes them (`expert_parallel`). Without a mesh nothing happens.

  Args:
    weights: the block's parameters, a slice of the stacks; or an Engram's.
    name: of the stack, or of the Engram module.
    dtype: the compute dtype.
  """
  mesh = current_mesh()
  if mesh is None:
    return weights
  stacked = name.endswith("blocks")

  def place(path, leaf):
    full = f"{name}/{parameter_name(path)}"
    rules = (spec for rule, spec in PARAMETER_RULES if re.search(rule, full))
    spec = tuple(next(rules, P()))[1 if stacked else 0 :]
    if any(re.search(rule, full) for rule, _ in EXPERT_RULES):
      return constrain(leaf, fitting(P(*spec), leaf.shape, mesh))
    spec = P(*(TENSOR if TENSOR in (axis or ()) else None for axis in spec))
    leaf = leaf if re.search(IN_FLOAT32, full) else leaf.astype(dtype)
    return constrain(leaf, fitting(spec, leaf.shape, mesh))

  return jax.tree_util.tree_map_with_path(place, weights)


def batch_sharding(mesh: Mesh | None) -> NamedSharding | None:
  """Of a batch's arrays [B, L]."""
  return mesh and NamedSharding(mesh, TOKENS)


def place_batch(
  batch: Mapping[str, Array | np.ndarray], mesh: Mesh | None
) -> Mapping[str, Array | np.ndarray]:
  """This process's part of a batch as arrays of the whole batch.

  Args:
    batch: arrays [B / processes, L], or those that this returned.
    mesh: None returns the batch as it is.

  Returns:
    Arrays [B, L], spread over the mesh's batch axes.
  """
  if mesh is None:
    return batch
  sharding = batch_sharding(mesh)

  def place(x):
    if isinstance(x, Array) and x.sharding == sharding:
      return x
    return jax.make_array_from_process_local_data(sharding, np.asarray(x))

  return {name: place(x) for name, x in batch.items()}
