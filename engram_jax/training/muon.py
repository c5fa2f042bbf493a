"""Muon on stacks of matrices, each orthogonalized by itself, on one device.

For a matrix W [rows, cols] with the gradient g (arXiv 2502.16982 §2):

  m <- mu m + g                     momentum, the only state
  u  = g + mu m                     Nesterov
  o  = f^5(u / |u|)                 singular values to nearly 1: Newton-Schulz
  f(x) = 3.4445 x - 4.775 (x x') x + 2.0315 (x x')^2 x
  W <- W - learning_rate (0.2 sqrt(max(rows, cols)) o + weight_decay W)

The scale makes an update's RMS that of AdamW, so that both take one schedule.

A parameter is a stack of matrices and says which of its axes are theirs
(`parameters.py`). On a mesh a device holds a piece of each. Newton-Schulz takes
whole matrices, but no device has to see all:

  [count, rows / n, cols]  all_to_all  [count / n, rows, cols]  Newton-Schulz
  [count / n, rows, cols]  all_to_all  [count, rows / n, cols]

`count` is padded with zeros, which stay zeros, to a multiple of the devices.
Momentum and decay stay where the parameter's piece lives. Devices that hold the
same pieces share the work too, and gather the result, if there is enough of it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from engram_jax import sharding
from engram_jax.errors import require
from engram_jax.parameters import Metadata, as_names, map_parameters

#: RMS of AdamW's updates, as the paper found it.
ADAM_RMS = 0.2
#: Of Newton-Schulz: of f, and how often.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5

#: From the names of a parameter's axes, its shape and the mesh to how it is
#: split.
SpecOf = Callable[[Sequence[str], tuple[int, ...], AbstractMesh], P]


def matrix_axes(
  name: str, metadata: Metadata, leaf: Any
) -> MuonDimensionNumbers | None:
  """Rows and columns of a parameter; None if it says that it is no matrix.

  Args:
    name: to name it by in an error.
    metadata: what the parameter says of itself.
    leaf: its array, or its shape; what stands before the axes that `metadata`
      names counts matrices.

  Raises:
    InputError: an array of fewer axes than have names.
  """
  axes, matrix = metadata.axes, metadata.matrix
  stacked = leaf.ndim - len(axes)
  valid = f"at least the axes {', '.join(axes)}"
  require(stacked >= 0, f"parameter {name}", f"{leaf.ndim} axes", valid)
  if matrix is None:
    return None
  rows, columns = (
    tuple(stacked + axes.index(axis) for axis in as_names(side))
    for side in matrix
  )
  return MuonDimensionNumbers(rows, columns)


def muon(
  *,
  momentum: float,
  weight_decay: float,
  decay_mask: Any = None,
  spec_of: SpecOf = sharding.parameter_spec,
) -> optax.GradientTransformation:
  """Muon for a learning rate of 1, of a tree whose leaves are all matrices.

  Args:
    momentum: mu.
    weight_decay: weight decay of the leaves that `decay_mask` names.
    decay_mask: as `mask` of `optax.adamw`.
    spec_of: asked under a mesh: how a parameter is split.

  Returns:
    A transformation of trees of Variables of float32 arrays. Its state is the
    momentum: an array like each parameter, of its name.

  Raises:
    InputError: when it meets a parameter that was made without metadata, or
      one that is no matrix.
  """

  def orthogonalize(name, metadata, x):
    axes = matrix_axes(name, metadata, x)
    valid = "one that says which of its axes are a matrix"
    require(axes is not None, f"parameter {name}", "no matrix", valid)
    mesh = sharding.current_mesh()
    spec = sharding.WHOLE
    if mesh is not None:
      spec = spec_of(metadata.axes, x.shape, mesh)
    return orthogonalized(x, axes, spec)

  def of_all(updates, _):
    return map_parameters(orthogonalize, updates)

  return optax.chain(
    optax.trace(decay=momentum, nesterov=True),
    optax.stateless(of_all),
    optax.add_decayed_weights(weight_decay, mask=decay_mask),
    optax.scale_by_learning_rate(1.0),
  )


# --- one parameter ---


def orthogonalized(
  x: Float[Array, "..."], axes: MuonDimensionNumbers, spec: P = sharding.WHOLE
) -> Float[Array, "..."]:
  """Each matrix of `x` with singular values near 1, times its scale.

  Args:
    x: float32, a stack of matrices.
    axes: which of its axes are rows and columns; the others count.
    spec: how `x` is split over the current mesh; ignored without one.

  Returns:
    float32, of the shape and layout of `x`.
  """
  rows, columns = (
    [a % x.ndim for a in ((axis,) if isinstance(axis, int) else axis)]
    for axis in axes
  )
  batch = [a for a in range(x.ndim) if a not in (*rows, *columns)]
  order = (*batch, *rows, *columns)
  height, width = (math.prod(x.shape[a] for a in g) for g in (rows, columns))
  scale = ADAM_RMS * math.sqrt(max(height, width))
  mesh = sharding.current_mesh()

  def body(part):
    part = part.transpose(order)
    pieces = part.reshape(-1, *part.shape[len(batch) :])
    layout = Layout.create(mesh, spec, (*rows, *columns), len(pieces))
    matrices = spread(pieces, layout)
    found = newton_schulz(matrices.reshape(-1, height, width))
    found = collect(found.reshape(matrices.shape), layout)[: len(pieces)]
    found = scale * found.reshape(part.shape)
    return found.transpose(sorted(range(x.ndim), key=order.__getitem__))

  if mesh is None:
    return body(x)
  return jax.shard_map(body, in_specs=spec, out_specs=spec)(x)


def newton_schulz(
  matrices: Float[Array, "count rows cols"],
) -> Float[Array, "count rows cols"]:
  """f^5 of each matrix over its norm; a matrix of zeros stays one.

  No finite matrix is too large for its norm.
  """
  largest = jnp.max(jnp.abs(matrices), axis=(1, 2), keepdims=True)
  # Powers of two, which change no digit: no square overflows, and what is left
  # is above 1, far from the 1e-8 that optax adds to the norm.
  factor = jnp.where(largest > 2.0**50, 2.0**-50, jnp.ones_like(largest))
  factor = jnp.where(largest > 2.0**90, 2.0**-85, factor)
  matrices = matrices * factor
  # Without momentum it carries nothing from one step to the next. A row of
  # coefficients per step makes it a loop, which compiles in half the time.
  transform = scale_by_muon(
    ns_coeffs=(COEFFICIENTS,) * STEPS,
    ns_steps=STEPS,
    beta=0.0,
    nesterov=False,
    weight_dimension_numbers=MuonDimensionNumbers(1, 2),
  )
  return transform.update(matrices, transform.init(matrices))[0]


# --- pieces of many matrices and a few whole ones, inside shard_map ---


class Layout(NamedTuple):
  """Which devices share the matrices that they have pieces of.

  Attributes:
    cuts: for each axis of a matrix that is split, the mesh axes and its place
      in an array of pieces [count, *axes of a matrix].
    copies: mesh axes along which all have the same pieces and share the work.
    devices: how many share the same matrices.
  """

  cuts: tuple[tuple[tuple[str, ...], int], ...]
  copies: tuple[str, ...]
  devices: int

  @classmethod
  def create(
    cls,
    mesh: AbstractMesh | None,
    spec: P,
    matrix: Sequence[int],
    count: int,
  ) -> "Layout":
    """The layout of one parameter.

    Args:
      mesh: None on one device.
      spec: how the parameter is split.
      matrix: its axes that are sides of a matrix, in the order of the pieces.
      count: number of a device's pieces.
    """
    if mesh is None:
      return cls((), (), 1)
    wide = [name for name in sharding.AXES if sharding.size(mesh, name) > 1]

    def names(axis: int) -> tuple[str, ...]:
      entry = spec[axis] if axis < len(spec) else None
      entry = (entry,) if isinstance(entry, str) else entry or ()
      return tuple(name for name in entry if name in wide)

    cuts = ((names(axis), place) for place, axis in enumerate(matrix, start=1))
    cuts = tuple((group, place) for group, place in cuts if group)
    used = {name for axis in range(len(spec)) for name in names(axis)}
    copies = tuple(name for name in wide if name not in used)
    devices = math.prod(
      sharding.size(mesh, name) for group, _ in cuts for name in group
    )
    shared = devices * math.prod(sharding.size(mesh, a) for a in copies)
    # Of a few matrices, most of what is gathered afterwards would be padding:
    # then each device of `copies` does the same work.
    if count < shared:
      return cls(cuts, (), devices)
    return cls(cuts, copies, shared)


def spread(pieces: Array, layout: Layout) -> Array:
  """Pieces [count, ...] to whole matrices [count / devices, ...], its share.

  `count` is padded with zeros first.

  Args:
    pieces: this device's pieces of `count` matrices.
    layout: how matrices are cut and over which devices.
  """
  missing = -len(pieces) % layout.devices
  x = jnp.pad(pieces, [(0, missing)] + [(0, 0)] * (pieces.ndim - 1))
  if layout.copies:
    share = len(x) // lax.axis_size(layout.copies)
    start = lax.axis_index(layout.copies) * share
    x = lax.dynamic_slice_in_dim(x, start, share)
  for axes, place in layout.cuts:
    x = lax.all_to_all(x, axes, 0, place, tiled=True)
  return x


def collect(matrices: Array, layout: Layout) -> Array:
  """The inverse of `spread`, the zeros included.

  Args:
    matrices: this device's share of the whole matrices.
    layout: the layout that `spread` was given.
  """
  x = matrices
  for axes, place in reversed(layout.cuts):
    x = lax.all_to_all(x, axes, place, 0, tiled=True)
  if layout.copies:
    x = lax.all_gather(x, layout.copies, tiled=True, to="invarying")
  return x
