"""Which optimizer moves which parameter of the backbone, and which the tables.

The backbone goes by optax, the tables by a row optimizer (`memory.row_sparse`,
`memory.sinkhorn`). Weight decay is for the backbone's matrices alone: gains and
biases are vectors that a decay would pull towards silence.
"""

import optax
from flax import nnx

from engram_jax.memory.row_sparse import (
  RowOptimizer,
  dense,
  require_decay,
  require_eps,
  row_sparse,
)
from engram_jax.memory.row_transformations import (
  scale_by_adam_per_row,
  scale_by_rowwise_adagrad,
)
from engram_jax.memory.sinkhorn import sinkhorn
from engram_jax.parameters import map_parameters
from engram_jax.run_config import TrainConfig
from engram_jax.training.muon import matrix_axes, muon


def decay_mask(params: nnx.State) -> nnx.State:
  """True for each leaf that weight decay applies to, in a tree like `params`.

  Gains and biases say that it does not, whatever their rank. `nnx.Optimizer`
  hands bare arrays to optax: there, a mask is made beforehand, by
  `nnx.as_pure(decay_mask(nnx.state(model, nnx.Param)))`.

  Raises:
    InputError: a parameter that was made without metadata.
  """
  return map_parameters(lambda _, metadata, leaf: metadata.decay, params)


def backbone_optimizer(config: TrainConfig) -> optax.GradientTransformation:
  """The backbone's optimizer by its name, for a learning rate of 1.

  The step multiplies by the schedule. It does not clip: rows count in the norm,
  and they do not come here.

  `adamw` moves all parameters. `muon` moves those by which a whole activation
  is multiplied: the matrices of attention, of dense blocks and of experts (each
  expert by itself), of routers and hyper-connections, and the Engram layers'
  projections; and AdamW the rest: norms and biases, the embedding and the head,
  as in Moonlight (arXiv 2502.16982 §2.2), and the taps of the convolution,
  which multiply channel by channel. A router is a matrix like any other: there,
  too, Muon has it, and its balancing bias is no parameter.

  Raises:
    InputError: when the transformation meets a parameter that was made without
      metadata (`parameters.param`).
  """
  adamw = optax.adamw(
    1.0,
    b1=config.adam_b1,
    b2=config.adam_b2,
    eps=config.adam_eps,
    weight_decay=config.weight_decay,
    mask=decay_mask,
  )
  if config.optimizer == "adamw":
    return adamw
  matrices = muon(
    momentum=config.muon_momentum,
    weight_decay=config.weight_decay,
    decay_mask=decay_mask,
  )
  return optax.partition({"muon": matrices, "adamw": adamw}, optimizer_names)


def optimizer_names(params: nnx.State) -> nnx.State:
  """`muon` or `adamw` for each leaf, in a tree like `params`.

  Raises:
    InputError: a parameter that was made without metadata.
  """

  def optimizer_name(name, metadata, leaf):
    return "adamw" if matrix_axes(name, metadata, leaf) is None else "muon"

  return map_parameters(optimizer_name, params)


def table_optimizer(config: TrainConfig) -> RowOptimizer:
  """The tables' optimizer by its name, without weight decay (paper §4)."""
  name = config.table_optimizer
  if name == "sinkhorn":
    return sinkhorn()
  if name == "rowwise_adagrad":
    return row_sparse(scale_by_rowwise_adagrad())
  constants = dict(b1=config.adam_b1, b2=config.adam_b2, eps=config.adam_eps)
  if name == "lazy_adam_row_steps":
    return row_sparse(scale_by_adam_per_row(**constants))
  # Beyond what the config refuses: what float32 cannot tell from 0 or 1.
  require_decay("train.adam_b1", config.adam_b1)
  require_decay("train.adam_b2", config.adam_b2)
  require_eps(config.adam_eps)
  adam = optax.scale_by_adam(**constants)
  return dense(adam) if name == "dense_adam" else row_sparse(adam)
