"""LoRA (arXiv 2106.09685): low-rank additions to a frozen model's matrices.

  W' = W + scale * A B,   A [rows, r] random,   B [r, columns] zeros at first

The control for training rows alone (`rows_only.py`): as many numbers in the
backbone instead. Which of a parameter's axes are rows and columns it says
itself (`engram_jax.parameters`); the blocks of a stack, and experts, get
factors of their own.

Factors are a pytree beside the model; `merge_lora` gives an ordinary model, to
be evaluated or decoded from like any other.
"""

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from engram_jax.backbone.transformer import Transformer
from engram_jax.errors import require, require_integer
from engram_jax.memory.lookup import Tables
from engram_jax.memory.memory import Memory
from engram_jax.parameters import Metadata, as_names, map_parameters
from engram_jax.training.losses import mean_model_loss
from engram_jax.training.setup import Batch

#: Parameters that get factors, by patterns of their names.
ATTENTION = ("*/attention/query", "*/attention/out")
ATTENTION_AND_FFN = (*ATTENTION, "*/ffn/up", "*/ffn/down")


class Factors(NamedTuple):
  """The two factors of one parameter's addition.

  Attributes:
    a: [stack and rows of the parameter, r].
    b: [stack and columns of the parameter, r].
  """

  a: Float[Array, "..."]
  b: Float[Array, "..."]


Lora = Mapping[str, Factors]


def init_lora(
  key: PRNGKeyArray | Array,
  model: Transformer,
  *,
  rank: int,
  matrices: Sequence[str] = ATTENTION_AND_FFN,
) -> dict[str, Factors]:
  """New factors, which add nothing.

  Args:
    key: a JAX random key.
    model: the model that they are for.
    rank: r.
    matrices: patterns of parameters' names, e.g. `*/attention/query`.

  Returns:
    Factors by the parameter's name; A of variance 1 / rows, B zeros.

  Raises:
    InputError: a rank below 1, a pattern without a parameter, or a parameter
      that is no matrix.
  """
  require_integer("rank", rank, low=1)
  found: dict[str, Factors] = {}

  def add(name: str, metadata: Metadata, leaf: Array) -> Array:
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in matrices):
      require(metadata.matrix is not None, "matrices", name, "only matrices")
      _, a, b = _axes(metadata, leaf)
      sizes = [leaf.shape[i] for i in a], [leaf.shape[i] for i in b]
      rows = math.prod(leaf.shape[i] for i in set(a) - set(b))
      own = jax.random.fold_in(key, len(found))
      normal = jax.random.normal(own, (*sizes[0], rank), jnp.float32)
      zeros = jnp.zeros((*sizes[1], rank), jnp.float32)
      found[name] = Factors(normal / math.sqrt(rows), zeros)
    return leaf

  map_parameters(add, nnx.state(model, nnx.Param))
  for pattern in matrices:
    ok = any(fnmatch.fnmatchcase(name, pattern) for name in found)
    require(ok, "matrices", pattern, "patterns of the model's parameters")
  return found


def count_lora(lora: Lora) -> int:
  """Number of scalars that are trained."""
  return sum(leaf.size for leaf in jax.tree.leaves(dict(lora)))


def merge_lora(
  model: Transformer, lora: Lora, *, scale: float = 1.0
) -> Transformer:
  """The model with the factors' products added to its matrices.

  Args:
    model: the frozen model; it stays as it is.
    lora: from `init_lora` of this model, or trained.
    scale: factor on every addition.
  """
  graph, params, rest = nnx.split(model, nnx.Param, ...)

  def add(name: str, metadata: Metadata, leaf: Array) -> Array:
    if name not in lora:
      return leaf
    whole, a, b = _axes(metadata, leaf)
    rank = leaf.ndim
    change = jnp.einsum(
      lora[name].a, [*a, rank], lora[name].b, [*b, rank], whole
    )
    return leaf + (scale * change).astype(leaf.dtype)

  return nnx.merge(graph, map_parameters(add, params), rest)


def make_lora_step(
  memory: Memory | None,
  optimizer: optax.GradientTransformation,
  *,
  scale: float = 1.0,
) -> Callable[..., tuple[dict[str, Factors], Any, Float[Array, ""]]]:
  """One optimizer step on the factors, jitted.

  Args:
    memory: the model's; None for a model without one.
    optimizer: optax's, with its learning rate.
    scale: as of `merge_lora`.

  Returns:
    `step(lora, opt_state, model, tables, batch)` to the factors and optimizer
    state after the step, and the mean loss before it, nats. The batch has
    `inputs`, `targets`, `breaks` and `loss_mask`, [B, L]; the tables stay as
    they are (an empty dict without a memory).
  """

  def step(lora, opt_state, model: Transformer, tables: Tables, batch: Batch):
    rows = None
    if memory is not None:
      context = {"breaks": batch["breaks"]}
      rows = memory.lookup(tables, batch["inputs"], **context).rows

    def mean_loss(lora):
      return mean_model_loss(merge_lora(model, lora, scale=scale), rows, batch)

    loss, gradients = jax.value_and_grad(mean_loss)(lora)
    updates, opt_state = optimizer.update(gradients, opt_state, lora)
    return optax.apply_updates(lora, updates), opt_state, loss

  return jax.jit(step)


def _axes(metadata: Metadata, leaf: Any) -> tuple[list[int], ...]:
  """All axes of a parameter; those of A; those of B, each without the rank."""
  stacked = leaf.ndim - len(metadata.axes)
  rows, columns = (
    {stacked + metadata.axes.index(name) for name in as_names(side)}
    for side in metadata.matrix
  )
  every = list(range(leaf.ndim))
  a = [axis for axis in every if axis not in columns]
  b = [axis for axis in every if axis not in rows]
  return every, a, b
