"""What a parameter says of itself, where it is made: metadata of its Variable.

  axes     a name for each axis of the array; `sharding.LOGICAL_AXES` has the
           mesh axes of each name
  matrix   (rows, columns), each an axis's name or a tuple of names: a matrix,
           or a stack of as many as the other axes count. None for what is no
           factor of a matrix product, and for what is read or scored by token
  decay    whether weight decay applies
  float32  whether it is used in float32 whatever the compute dtype

Whoever places, decays, orthogonalizes or casts parameters asks the parameter,
and knows none by its name. The metadata goes where the Variable goes: through
`nnx.split` and `nnx.merge`, `jit` and `vmap`, gradients, optax's trees, and
templates that checkpoints are read into. Where blocks are stacked, the stack's
axes stand before those that are named, and need no name: a stack and a slice of
it say the same. The keys are our own: Flax's `out_sharding` would place arrays
by itself wherever a mesh is in force.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from engram_jax.errors import InputError, require

#: Names of some of an array's axes: one, or several that are one side.
Side = str | tuple[str, ...]


class Metadata(NamedTuple):
  """What is known of one parameter; see the head of this file.

  Attributes:
    axes: names of the array's last axes.
    matrix: names of the axes that are a matrix's rows and its columns.
    decay: whether weight decay applies.
    float32: whether it is used in float32 whatever the compute dtype.
  """

  axes: tuple[str, ...]
  matrix: tuple[Side, Side] | None
  decay: bool
  float32: bool


def param(
  value: Any,
  *,
  axes: tuple[str, ...],
  matrix: tuple[Side, Side] | None = None,
  decay: bool = True,
  float32: bool = False,
  kind: type[nnx.Variable] = nnx.Param,
) -> nnx.Variable:
  """A parameter that says what it is.

  Args:
    value: the array, of one block; or its shape.
    axes: name of each of its axes.
    matrix: names of the axes that are a matrix's rows and its columns; None
      for what is no matrix.
    decay: whether weight decay applies.
    float32: whether it is used in float32 whatever the compute dtype.
    kind: type of the Variable.

  Raises:
    InputError: another number of names than axes, a name twice, or a matrix of
      other axes.
  """
  fits = len(axes) == value.ndim and len(set(axes)) == len(axes)
  require(fits, "axes", axes, f"{value.ndim} different names")
  if matrix is not None:
    named = [name for side in matrix for name in as_names(side)]
    fits = len(set(named)) == len(named) and set(named) <= set(axes)
    fits = fits and all(map(as_names, matrix))
    require(fits, "matrix", matrix, f"rows and columns, names of {axes}")
  metadata = Metadata(axes, matrix, decay, float32)
  return kind(value, **metadata._asdict())


def as_names(side: Side) -> tuple[str, ...]:
  """The axes of one side of a matrix."""
  return (side,) if isinstance(side, str) else side


def metadata_of(name: str, node: Any) -> Metadata:
  """The metadata of a parameter.

  Args:
    name: to name it by in an error.
    node: a Variable, or what was found in its place.

  Raises:
    InputError: no Variable, or one that was made without metadata.
  """
  found = node.get_metadata() if is_variable(node) else {}
  missing = [field for field in Metadata._fields if field not in found]
  if missing:
    value = type(node).__name__ + " without " + ", ".join(missing)
    valid = "a Variable made by engram_jax.parameters.param"
    raise InputError(f"parameter {name}", value, valid)
  return Metadata(*(found[field] for field in Metadata._fields))


def is_variable(node: Any) -> bool:
  """Whether `node` is a Flax Variable: as `is_leaf`, it keeps them whole."""
  return isinstance(node, nnx.Variable)


def map_parameters(
  function: Callable[[str, Metadata, Any], Any],
  tree: Any,
  *,
  others: Callable[[Any], Any] | None = None,
) -> Any:
  """A tree like `tree` of `function(name, metadata, array)`.

  Args:
    function: called for the array of each Variable, by its path's name.
    tree: a module, its state, its gradients or an optimizer's momentum; arrays
      or their shapes.
    others: called for an array that is in no Variable; None refuses it.

  Raises:
    InputError: a Variable that was made without metadata, or an array in none.
  """

  def of_one(path, node):
    if others is not None and not is_variable(node):
      return others(node)
    name = parameter_name(path)
    metadata = metadata_of(name, node)
    return jax.tree.map(lambda leaf: function(name, metadata, leaf), node)

  return jax.tree_util.tree_map_with_path(of_one, tree, is_leaf=is_variable)


def parameter_name(path: Sequence[Any]) -> str:
  """The path of a pytree's leaf as `moe_blocks/ffn/gate`."""
  name = jax.tree_util.keystr(tuple(path), simple=True, separator="/")
  return name.removesuffix("/value")  # a Variable's own field
