"""A Flax module around parameters that come from elsewhere."""

from flax import nnx

from engram_jax.config import EngramConfig
from engram_jax.errors import require
from engram_jax.fusion.engram import (
  Engram,
  EngramParams,
  param_metadata,
  param_shapes,
)
from engram_jax.parameters import param

#: What the released models do and have no field for.
RELEASED_OPTIONS = {
  "smallest_order": 2,
  "addressing": "ngrams",
  "gate": True,
  "per_stream_keys": True,
  "fusion": "gated",
}


def require_released_options(config: EngramConfig) -> None:
  """Refuses a memory that no released layout has a place for.

  Args:
    config: the memory's config.
  """
  for name, value in RELEASED_OPTIONS.items():
    found = getattr(config, name)
    require(found == value, name, found, f"{value}, as in the released models")


def engram_of(params: EngramParams, config: EngramConfig) -> Engram:
  """The module of `config` that holds `params`; nothing is drawn.

  Args:
    params: arrays of one Engram layer.
    config: the memory's config; says which arrays there are.

  Raises:
    InputError: parameters that `config` does not have, or lacks, or of another
      shape.
  """
  shapes = param_shapes(config)
  for name, value in params._asdict().items():
    found = None if value is None else tuple(value.shape)
    expected = shapes.get(name)
    valid = "None, as the config says" if expected is None else str(expected)
    require(found == expected, name, found, valid)
  engram = nnx.eval_shape(lambda: Engram(config, rngs=nnx.Rngs(0)))
  for name in shapes:
    metadata = param_metadata(name)._asdict()
    setattr(engram, name, param(getattr(params, name), **metadata))
  return engram
