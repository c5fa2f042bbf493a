"""Muon on stacks of matrices, each orthogonalized by itself, on one device.

For a matrix W [rows, cols] with the gradient g (arXiv 2502.16982 §2):

  m <- mu m + g                     momentum, the only state
  u  = g + mu m                     Nesterov
  o  = f^5(u / |u|)                 singular values to nearly 1: Newton-Schulz
  f(x) = 3.4445 x - 4.775 (x x') x + 2.0315 (x x')^2 x
  W <- W - learning_rate (0.2 sqrt(max(rows, cols)) o + weight_decay W)

The scale makes an update's RMS that of AdamW, so that both take one schedule.

A parameter is a stack of matrices (`MATRICES`), and on a mesh a device holds a
piece of each. Newton-Schulz takes whole matrices, but no device has to see all:

  [count, rows / n, cols]  all_to_all  [count / n, rows, cols]  Newton-Schulz
  [count / n, rows, cols]  all_to_all  [count, rows / n, cols]

`count` is padded with zeros, which stay zeros, to a multiple of the devices.
Momentum and decay stay where the parameter's piece lives. Devices that hold the
same pieces share the work too, and gather the result, if there is enough of it.
"""

import math
import re
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
from engram_jax.norms import power_of_two

#: RMS of AdamW's updates, as the paper found it.
ADAM_RMS = 0.2
#: Of Newton-Schulz: of f, and how often.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5

_LAST_TWO = MuonDimensionNumbers(-2, -1)
#: Parameters by name and rank: which axes are a matrix's rows, and which its
#: columns. All others count matrices. n counts blocks; M is the memory's width.
MATRICES: tuple[tuple[str, MuonDimensionNumbers], ...] = (
  # [n, D, heads, Q], [n, C, heads, N]: what all heads are made from together.
  (r"attention/(query|key_up|value_up)/4$", MuonDimensionNumbers(1, (2, 3))),
  # [n, heads, W, D]
  (r"attention/out/4$", MuonDimensionNumbers((1, 2), 3)),
  # [n, D, C], [n, D, P]
  (r"attention/(kv_down|key_rope)/3$", _LAST_TWO),
  # Routed experts [n, E, D, F], [n, E, F, D]: one matrix an expert.
  (r"ffn/(gate|up|down)/4$", _LAST_TWO),
  # Dense blocks and shared experts [n, D, F], [n, F, D].
  (r"ffn/(shared/)?(gate|up|down)/3$", _LAST_TWO),
  # [n, D, E]
  (r"ffn/router/3$", _LAST_TWO),
  # Hyper-connections [n, G * D, G * (G + 2)].
  (r"(attention|ffn)_streams/kernel/3$", _LAST_TWO),
  # [M, G + 1, D]: G keys and the value, each from the whole memory.
  (r"engrams/\d+/projection/3$", MuonDimensionNumbers(0, 2)),
)

#: What is no factor of a matrix product: gains, biases, a convolution's taps.
#: And what is read or scored by token: a gradient's rows are one token's each.
NO_MATRICES = r"(scale|bias|conv_kernel|embedding/table|(^|/)head)/\d+$"

#: From a parameter's path, its array and the mesh to how it is split.
SpecOf = Callable[[Sequence[Any], Any, AbstractMesh], P]


def matrix_axes(path: Sequence[Any], leaf: Any) -> MuonDimensionNumbers | None:
  """Rows and columns of the parameter at `path`; None if it is no matrix.

  Args:
    path: of a pytree's leaf.
    leaf: an array, or its shape.

  Raises:
    InputError: a parameter that no rule names: none is left to AdamW unasked.
  """
  name = f"{sharding.parameter_name(path)}/{leaf.ndim}"
  for pattern, axes in MATRICES:
    if re.search(pattern, name):
      return axes
  known = re.search(NO_MATRICES, name) is not None
  valid = "a name/rank of training/muon.py, MATRICES or NO_MATRICES"
  require(known, "parameter", name, valid)
  return None


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
    weight_decay: of the leaves that `decay_mask` names.
    decay_mask: as `mask` of `optax.adamw`.
    spec_of: asked under a mesh: how a parameter is split.

  Returns:
    A transformation of trees of float32 arrays. Its state is the momentum: an
    array like each parameter, of its name.
  """

  def orthogonalize(path, x):
    mesh = sharding.current_mesh()
    spec = sharding.WHOLE if mesh is None else spec_of(path, x, mesh)
    return orthogonalized(x, matrix_axes(path, x), spec)

  def of_all(updates, _):
    return jax.tree_util.tree_map_with_path(orthogonalize, updates)

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
  matrices = matrices * power_of_two(largest)
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
      count: of a device's pieces.
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
  """The inverse of `spread`, the zeros included."""
  x = matrices
  for axes, place in reversed(layout.cuts):
    x = lax.all_to_all(x, axes, place, 0, tiled=True)
  if layout.copies:
    x = lax.all_gather(x, layout.copies, tiled=True, to="invarying")
  return x
