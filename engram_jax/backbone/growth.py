"""A trained transformer over a memory of more columns (`memory/growth.py`)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from engram_jax.backbone.transformer import Transformer
from engram_jax.config import EngramConfig
from engram_jax.errors import require
from engram_jax.fusion.engram import param_init, param_metadata, param_shapes
from engram_jax.parameters import param


def grow_transformer(
  model: Transformer, config: EngramConfig, *, key: PRNGKeyArray | Array
) -> Transformer:
  """The transformer with projections for the columns that a memory gained.

  All weights are the model's, but that the Engram layers' projections go on
  below, drawn as in a new model of `config`. On rows of zeros these add exact
  zeros: the logits are the model's, but for the rounding of longer sums. Drawn,
  and not zeros, because a row has no gradient through a projection of zeros:
  so new rows may be trained alone.

  Args:
    model: the trained model; it stays as it is.
    config: config of the grown memory: the model's with more orders. One with
      more rows only needs no new projection, and none is made.
    key: a JAX random key.

  Raises:
    InputError: a model without a memory, or a config that differs in more than
      its n-gram orders.
  """
  old = model.config.engram
  require(old is not None, "model.config.engram", None, "a memory to grow")
  same = dataclasses.replace(
    config, rows_per_head=old.rows_per_head, conv_dilation=old.conv_dilation
  )
  ok = same == old and config.dilation == old.dilation
  valid = "the model's, with other rows_per_head: more orders, same dilation"
  require(ok and config.columns >= old.columns, "config", config, valid)

  grown = nnx.clone(model)
  grown.config = dataclasses.replace(model.config, engram=config)
  shape = param_shapes(config)["projection"]
  for number, engram in enumerate(grown.engrams):
    engram.config = config
    trained = engram.projection[...]
    own = jax.random.fold_in(key, number)
    drawn = param_init("projection")(own, shape, trained.dtype)
    value = jnp.concatenate([trained, drawn[len(trained) :]])
    metadata = param_metadata("projection")._asdict()
    engram.projection = param(value, **metadata)
  return grown
