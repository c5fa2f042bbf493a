"""Everything that a training step changes, as one value.

The tables stand beside the parameters, not among them: nothing differentiates
with respect to a table, and each has an optimizer of its own.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from engram_jax.backbone.moe import BalancingBias
from engram_jax.backbone.transformer import Transformer
from engram_jax.config import ModelConfig
from engram_jax.memory.hashing import NgramHash
from engram_jax.memory.row_optimizers import RowOptimizer
from engram_jax.memory.table import init_table
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


def init_state(
  key: Array,
  config: ModelConfig,
  hashing: NgramHash | None,
  *,
  optimizer: optax.GradientTransformation,
  row_optimizer: RowOptimizer,
  shards: int = 1,
) -> TrainState:
  """A new run's state. Pure: jit it, and no array is made twice.

  Args:
    key: a JAX random key. The backbone's weights depend on it alone, so that a
      model with and one without a memory start alike where they are alike.
    config: the model.
    hashing: its hash, whose `num_rows` are the tables' sizes; None without a
      memory.
    optimizer: of the parameters.
    row_optimizer: of the tables.
    shards: devices that share a table; its rows are padded with zeros to a
      multiple of them, and are the same whatever their number.
  """
  model_key, table_key = jax.random.split(key)
  model = Transformer(config, rngs=nnx.Rngs(params=model_key))
  _, params, balance = nnx.split(model, nnx.Param, BalancingBias)
  tables = {}
  if hashing is not None:
    for layer in hashing.layers:
      tables[layer] = init_table(
        jax.random.fold_in(table_key, layer),
        hashing.num_rows[layer],
        config.engram.head_dim,
        std=config.engram.table_init_std,
        shards=shards,
      )
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    balance=balance,
    opt_state=optimizer.init(params),
    tables=tables,
    table_states={i: row_optimizer.init(t) for i, t in tables.items()},
  )


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
  """The tree like `template` whose `flatten` is `leaves`."""
  paths, structure = jax.tree_util.tree_flatten_with_path(template)
  names = [parameter_name(path) for path, _ in paths]
  return jax.tree.unflatten(structure, [leaves[name] for name in names])
