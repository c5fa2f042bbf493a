"""The Engram layer for Linen models: the same `fuse`, `self.param` per array.

Parameter names and shapes are those of `EngramParams`, so weights move between
this and `engram_jax.Engram` by name. `init` boxes each with the names of its
axes (`nn.LogicallyPartitioned`; `nn.unbox` takes the arrays out). They place
nothing without rules. Ours are `list(sharding.LOGICAL_AXES.items())`, given to
`nn.logical_axis_rules`. Which parameters are matrices, and which decay:
`fusion.engram.param_metadata`.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Int

from engram_jax.config import EngramConfig
from engram_jax.fusion.engram import (
  EngramParams,
  Fusion,
  fuse,
  fuse_options,
  param_init,
  param_metadata,
  param_shapes,
)
from engram_jax.fusion.short_conv import ConvState
from engram_jax.types import AnyHidden, Breaks, Rows


class Engram(nn.Module):
  """Parameters of one Engram layer, and `fuse` on them.

  Example:
    >>> engram = Engram(config)
    >>> variables = engram.init(key, hidden, rows)
    >>> update, state = engram.apply(variables, hidden, rows)

  Attributes:
    config: sizes and options.
  """

  config: EngramConfig

  def setup(self):
    """Declares the parameters, with their logical axes."""

    def make(name: str, shape: tuple[int, ...]) -> Array:
      axes = param_metadata(name).axes
      init = nn.with_logical_partitioning(param_init(name), axes)
      return self.param(name, init, shape, jnp.float32)

    shapes = param_shapes(self.config)
    arrays = {name: make(name, shape) for name, shape in shapes.items()}
    self.arrays = EngramParams(**arrays)

  def fuse(
    self,
    hidden: AnyHidden,
    rows: Rows,
    *,
    state: ConvState | None = None,
    breaks: Breaks | None = None,
    lengths: Int[Array, "B"] | None = None,
  ) -> Fusion:
    """As `__call__`, with the gates.

    Args:
      hidden: [B, L, G, D] or [B, L, D]; any float dtype.
      rows: [B, L, K, d]; any float dtype.
      state: what the call before returned; None at a sequence's start.
      breaks: [B, L], as given to the hash.
      lengths: int32 [B], number of real positions.
    """
    return fuse(
      self.arrays,
      hidden,
      rows,
      state=state,
      breaks=breaks,
      lengths=lengths,
      **fuse_options(self.config),
    )

  def __call__(
    self,
    hidden: AnyHidden,
    rows: Rows,
    *,
    state: ConvState | None = None,
    breaks: Breaks | None = None,
    lengths: Int[Array, "B"] | None = None,
  ) -> tuple[AnyHidden, ConvState | None]:
    """The update, of `hidden`'s shape, and the decode state."""
    fused = self.fuse(hidden, rows, state=state, breaks=breaks, lengths=lengths)
    return fused.update, fused.state
