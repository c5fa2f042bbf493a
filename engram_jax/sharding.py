"""Devices as a mesh, and which mesh axis each axis of an array lies along.

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
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from engram_jax.errors import require
from engram_jax.parameters import map_parameters
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
#: An array [B, L, ...] of the lookup: the devices of a tensor group, which
#: hold the same tokens, ask for different rows.
TOKENS_BY_DEVICE = P(BATCH, TENSOR)

#: The mesh axes that an axis of a parameter is split over, by its name there
#: (`parameters.py`): one, several, or None for an axis that no device splits.
#: A mesh axis splits one axis of an array, the first that asks for it; an axis
#: that a size does not divide by is left out. So it is what comes first that is
#: split over `data`, along which parameters are gathered to compute with: what
#: a TPU has in its last two axes would have to fall on tiles of 8 x 128.
LOGICAL_AXES: dict[str, str | tuple[str, ...] | None] = {
  "vocab": DATA,
  "expert": EXPERT,
  "mlp": (TENSOR, DATA),  # hidden width of a SwiGLU
  "memory": DATA,  # a position's rows side by side, K * d
  "stream_inputs": DATA,  # all streams of a token, G * D
  "latent": DATA,
  "heads": DATA,
  "embed": DATA,  # D, of what multiplies a hidden state or makes one
  "head_dim": None,
  "rope": None,
  "outputs": None,  # an Engram's keys and its value
  "streams": None,
  "mixing": None,  # numbers per token of hyper-connections
  "mixing_parts": None,
  "router_scores": None,  # an entry an expert, on every device
  "taps": None,
  "width": None,  # of norms, biases and what else is on every device
}


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
  """Number of devices along `axes`, all if none is named; 1 without a mesh.

  Args:
    mesh: mesh of the devices; None for one device.
    *axes: names of mesh axes.
  """
  if mesh is None:
    return 1
  return math.prod(mesh.shape[axis] for axis in axes or AXES)


def is_explicit(mesh: Mesh | AbstractMesh | None) -> bool:
  """Whether arrays carry their shardings in their types."""
  if mesh is None:
    return False
  return all(kind == AxisType.Explicit for kind in mesh.axis_types)


def constrain(x: Array, spec: P) -> Array:
  """`x` laid out as `spec` on the current mesh; `x` itself without one.

  Args:
    x: array of any shape.
    spec: mesh axes of each axis of `x`.
  """
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

  Args:
    config: config of the run.
    mesh: mesh of the devices; None fits every run.

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
  ok = moe.dispatch != "dropless" or experts == 1
  valid = f"bucketed or dense with mesh.expert = {experts}"
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
  names = [mesh_axes(entry) for entry in spec]
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
  """Rows of a table that `devices` share equally: the last ones stay unused.

  Args:
    num_rows: number of rows in use.
    devices: number of devices.
  """
  return -(-num_rows // devices) * devices


# --- placing a state and its batches ---


def state_shardings(state: Any, mesh: Mesh | None) -> Any:
  """A tree like `state`, a `TrainState`, with the sharding of each leaf.

  Args:
    state: arrays, or their shapes.
    mesh: None gives None: on the default device.

  Raises:
    InputError: a parameter that was made without metadata.
  """
  if mesh is None:
    return None

  def of_table(rows: int, tree: Any):
    return jax.tree.map(
      lambda leaf: NamedSharding(mesh, table_spec(leaf, rows)), tree
    )

  rows = {i: table.shape[0] for i, table in state.tables.items()}

  def of_parameter(name, metadata, leaf):
    del name
    spec = parameter_spec(metadata.axes, leaf.shape, mesh)
    return NamedSharding(mesh, spec)

  whole = NamedSharding(mesh, WHOLE)
  place = functools.partial(map_parameters, of_parameter)
  return dataclasses.replace(
    state,
    step=whole,
    params=place(state.params),
    balance=place(state.balance),
    # Counts and the like are of no parameter.
    opt_state=place(state.opt_state, others=lambda _: whole),
    tables={i: of_table(rows[i], x) for i, x in state.tables.items()},
    table_states={
      i: of_table(rows[i], x) for i, x in state.table_states.items()
    },
  )


def table_spec(leaf: Any, rows: int) -> P:
  """How a table of `rows` rows, or an array of its optimizer's state, is split.

  An array of such a state has one entry a row, or stands for the whole table.

  Args:
    leaf: a table or an array of its optimizer's state, or its abstract shape.
    rows: number of the table's rows, padding included.
  """
  return TABLE if leaf.ndim and leaf.shape[0] == rows else P()


def parameter_spec(
  axes: Sequence[str], shape: tuple[int, ...], mesh: Mesh | AbstractMesh
) -> P:
  """How a parameter, or an optimizer's array of it, is split.

  Args:
    axes: names of its last axes, in `LOGICAL_AXES`; those before them, of a
      stack of blocks, are not split.
    shape: shape of the array, which may be what an optimizer keeps of the
      whole.
    mesh: the mesh whose axes the sizes are to be divided by.

  Raises:
    InputError: an unknown name.
  """
  split: list[str | tuple[str, ...] | None] = []
  free = set(AXES)
  for axis in axes:
    known = axis in LOGICAL_AXES
    require(known, "axes", axis, f"names of {', '.join(LOGICAL_AXES)}")
    names = tuple(a for a in mesh_axes(LOGICAL_AXES[axis]) if a in free)
    free -= set(names)
    split.append(names[0] if len(names) == 1 else names or None)
  while split and split[-1] is None:
    split.pop()
  if not split or len(shape) < len(axes):
    return WHOLE
  stacked = len(shape) - len(axes)
  return fitting(P(*[None] * stacked, *split), shape, mesh)


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """The mesh axes of one entry of a `PartitionSpec`."""
  return (entry,) if isinstance(entry, str) else entry or ()


def fitting(spec: P, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
  """`spec` without the axes that do not divide the sizes of `shape`.

  Args:
    spec: mesh axes of each axis of an array.
    shape: shape of that array.
    mesh: the mesh whose axes `spec` names.
  """

  def fit(entry, length):
    axes = mesh_axes(entry)
    while axes and length % size(mesh, *axes):
      axes = axes[:-1]
    return axes[0] if len(axes) == 1 else axes or None

  return P(*(fit(entry, length) for entry, length in zip(spec, shape)))


def for_compute(weights: Any, *, dtype: str) -> Any:
  """One block's weights where the block is computed: whole, in `dtype`.

  Cast before it travels. What is split over `expert` stays as it is: experts
  are gathered by whoever computes them (`expert_parallel`). Without a mesh
  nothing happens.

  Args:
    weights: the block's parameters, a slice of the stacks; or an Engram's.
    dtype: the compute dtype.

  Raises:
    InputError: a parameter that was made without metadata.
  """
  mesh = current_mesh()
  if mesh is None:
    return weights

  def place(name, metadata, leaf):
    del name
    spec = parameter_spec(metadata.axes, leaf.shape, mesh)
    if any(EXPERT in mesh_axes(LOGICAL_AXES[axis]) for axis in metadata.axes):
      return constrain(leaf, spec)
    spec = P(
      *(TENSOR if TENSOR in mesh_axes(entry) else None for entry in spec)
    )
    return constrain(leaf if metadata.float32 else leaf.astype(dtype), spec)

  return map_parameters(place, weights)


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
