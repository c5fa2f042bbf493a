"""Everything that a training step changes, as one value.

The tables stand beside the parameters, not among them: nothing differentiates
with respect to a table, and each has an optimizer of its own.
"""

import dataclasses
from typing import Any

import jax
import optax
from flax import nnx

from engram_jax.backbone.moe import BalancingBias
from engram_jax.backbone.transformer import Transformer
from engram_jax.config import ModelConfig
from engram_jax.parameters import parameter_name


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """A point of a training run.

  Attributes:
    step: int32, steps taken.
    params: the backbone's and the Engram layers' parameters.
    balance: the experts' balancing biases; no gradient reaches them.
    opt_state: optax's, of `params`.
    tables: per Engram layer [R, d].
    table_states: the row optimizer's, per Engram layer.
  """

  # Leaves are arrays, or in their place shapes or shardings: as in any pytree.
  step: Any
  params: nnx.State
  balance: nnx.State
  opt_state: optax.OptState
  tables: dict[int, Any]
  table_states: dict[int, Any]


def abstract_model(
  config: ModelConfig,
) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
  """The model's structure and the shapes of its arrays; allocates nothing."""

  def build():
    model = Transformer(config, rngs=nnx.Rngs(params=jax.random.key(0)))
    return nnx.split(model, nnx.Param, BalancingBias)

  graph, params, balance = jax.eval_shape(build)
  return graph, params, balance


def count_parameters(tree: Any) -> int:
  """Number of scalars in a tree of arrays, or of their shapes."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def flatten(tree: Any) -> dict[str, Any]:
  """The leaves of a state by path, e.g. `moe_blocks/ffn/gate`.

  The names hold no trace of how Flax wraps its variables, so that a checkpoint
  outlives its versions. Leaves may be arrays or their shapes.
  """
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  flat = {parameter_name(path): leaf for path, leaf in leaves}
  assert len(flat) == len(leaves), "two leaves of one name"
  return flat


def unflatten(template: Any, leaves: dict[str, Any]) -> Any:
  """The tree like `template` whose `flatten` is `leaves`.

  Args:
    template: a pytree of the wanted structure.
    leaves: its leaves by name, as `flatten` gives them.
  """
  paths, structure = jax.tree_util.tree_flatten_with_path(template)
  names = [parameter_name(path) for path, _ in paths]
  return jax.tree.unflatten(structure, [leaves[name] for name in names])
