"""Devices as a mesh, and which axis of an array lies along which of its axes.

  data     splits the batch
  expert   splits the batch too, and the routed experts
  tensor   splits the hidden width of experts and dense blocks

A table's rows lie along all three, so that every device holds an equal share of
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

DATA, EXPERT, TENSOR = AXES = ("data", "expert", "tensor")
#: What the batch is split over.
BATCH = (DATA, EXPERT)
#: Rows of a table, and of their optimizer's state.
TABLE = P(AXES)
#: An array [B, L, ...] of the model.
TOKENS = P(BATCH)
#: An array [B, L, ...] of the retrieval: the devices of a tensor group, which
#: hold the same tokens, ask for different rows.
LOOKUPS = P(BATCH, TENSOR)

#: Parameters by the end of their name: the first rule that fits. Whatever no
#: rule names is on every device.
PARAMETER_RULES: tuple[tuple[str, P], ...] = (
  # Routed experts: [E, D, F] and [E, F, D].
  (r"blocks/\d+/ffn/(gate|up)/3$", P(EXPERT, None, TENSOR)),
  (r"blocks/\d+/ffn/down/3$", P(EXPERT, TENSOR, None)),
  # SwiGLU of dense blocks and of shared experts: [D, F] and [F, D].
  (r"(ffn|shared)/(gate|up)/2$", P(None, TENSOR)),
  (r"(ffn|shared)/down/2$", P(TENSOR, None)),
)


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
  count, others = len(devices), config.expert * config.tensor
  ok = count % others == 0
  valid = f"a divisor of the number of devices, {count}"
  require(ok, "mesh.expert * mesh.tensor", others, valid)
  data = config.data or count // others
  product = data * others
  valid = f"the number of devices, {count}; data = 0 takes what is left"
  name = "mesh.data * mesh.expert * mesh.tensor"
  require(product == count, name, product, valid)
  if count == 1:
    return None
  shape = (data, config.expert, config.tensor)
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
  divides(name, rows, batch, "mesh.data * mesh.expert")
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather_parameter(x: Array, axes: Any, axis: int, dtype: Any) -> Array:
  """A parameter whose `axis` is split over mesh axes, whole and cast.

  Inside `shard_map`. It travels in the compute dtype; its gradient is summed
  over the devices in the parameter's own, and each keeps its part.

  Args:
    x: this device's part.
    axes: the mesh axes, a name or a tuple of names.
    axis: of `x`.
    dtype: the compute dtype.
  """
  return jax.lax.all_gather(x.astype(dtype), axes, axis=axis, tiled=True)


def _gather_forward(x, axes, axis, dtype):
  # An empty array carries the parameter's dtype to the backward pass.
  return gather_parameter(x, axes, axis, dtype), x[:0]


def _gather_backward(axes, axis, dtype, empty, gradient):
  del dtype
  gradient = gradient.astype(empty.dtype)
  return (
    jax.lax.psum_scatter(gradient, axes, scatter_dimension=axis, tiled=True),
  )


gather_parameter.defvjp(_gather_forward, _gather_backward)


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
    lambda path, leaf: NamedSharding(mesh, parameter_spec(path, leaf)), state
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


def parameter_spec(path: Sequence[Any], leaf: Any) -> P:
  """How a parameter, or the optimizer's array of its name, is split."""
  name = jax.tree_util.keystr(tuple(path), simple=True, separator="/")
  name = f"{name.removesuffix('/value')}/{leaf.ndim}"
  for pattern, spec in PARAMETER_RULES:
    if re.search(pattern, name):
      return spec
  return P()


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
