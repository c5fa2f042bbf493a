"""OverEncoding (arXiv 2501.16975), a baseline: n-grams in the input embedding.

With e_t^n the rows of order n side by side, h_t the token's own embedding:

  h_t <- (h_t + sum over orders n of W_n e_t^n) / (1 + number of orders)

The same tables and hash as Engram's, read before block 0 alone; no gate, no
key, no convolution. `OverEncoding` has the interface of `fusion.engram.Engram`.
A position that is not text keeps its embedding, as all do when the memory is
off.
"""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from engram_jax.config import EngramConfig
from engram_jax.errors import require
from engram_jax.fusion.engram import Fusion
from engram_jax.fusion.short_conv import ConvState
from engram_jax.memory.breaks import require_breaks
from engram_jax.parameters import param
from engram_jax.types import AnyHidden, Break, Breaks, Rows


def average_into(
  projection: Float[Array, "M D"],
  hidden: AnyHidden,
  rows: Rows,
  *,
  orders: int,
  dtype: DTypeLike = jnp.float32,
  breaks: Breaks | None = None,
) -> Fusion:
  """What makes of the input embedding the average with the n-grams' vectors.

  Args:
    projection: [M, D], the W_n of all orders one below the other; M is K * d.
    hidden: [B, L, G, D] or [B, L, D], the input embedding in every stream.
    rows: [B, L, K, d], what `lookup` read; any float dtype.
    orders: number of n-gram orders.
    dtype: dtype of the product and of the update.
    breaks: [B, L], as given to the hash: positions that are not text get gate
      and update 0.

  Returns:
    The update to add to `hidden`, no state, and gates of 1.

  Raises:
    InputError: rows or hidden state of other widths or positions; breaks that
      are none (outside jit).
  """
  without_axis = hidden.ndim == 3
  if without_axis:
    hidden = hidden[:, :, None]
  memory, size = projection.shape
  valid = f"shape [{hidden.shape[0]}, {hidden.shape[1]}, K, d] with hidden's"
  require(rows.shape[:2] == hidden.shape[:2], "rows", rows.shape, valid)
  width = rows.shape[2] * rows.shape[3]
  valid = f"K * d = {memory}, the projection's input"
  require(width == memory, "rows", rows.shape, valid)
  valid = f"shape [B, L, G, {size}]"
  require(hidden.shape[3] == size, "hidden", hidden.shape, valid)

  entry = rows.reshape(*rows.shape[:2], width).astype(dtype)
  # The sum over the orders is one product.
  vectors = (entry @ projection.astype(dtype))[:, :, None]
  update = (vectors - orders * hidden.astype(dtype)) / (orders + 1)
  gates = jnp.ones_like(hidden[..., 0], jnp.float32)
  if breaks is not None:
    require_breaks(breaks)
    is_text = (breaks != Break.NON_TEXT)[..., None]
    gates = jnp.where(is_text, gates, 0)
    update = jnp.where(is_text[..., None], update, 0)
  return Fusion(update[:, :, 0] if without_axis else update, None, gates)


class OverEncoding(nnx.Module):
  """The projections of OverEncoding, and `average_into` on them."""

  def __init__(self, config: EngramConfig, *, rngs: nnx.Rngs):
    fusion = config.fusion
    require(fusion == "input_average", "fusion", fusion, "input_average")
    self.config = config
    self.orders = len(config.rows_per_head)
    # Every order's vector at the scale of its rows.
    init = nnx.initializers.variance_scaling(self.orders, "fan_in", "normal")
    shape = (config.memory_width, config.hidden_size)
    value = init(rngs.params(), shape, jnp.float32)
    axes = ("memory", "embed")
    self.projection = param(value, axes=axes, matrix=axes)

  def fuse(
    self,
    hidden: AnyHidden,
    rows: Rows,
    *,
    state: ConvState | None = None,
    breaks: Breaks | None = None,
    lengths: Int[Array, "B"] | None = None,
  ) -> Fusion:
    """As `__call__`, with the gates, which are 1.

    Args:
      hidden: [B, L, G, D] or [B, L, D], the input embedding.
      rows: [B, L, K, d]; any float dtype.
      state: None: nothing is kept from call to call.
      breaks: [B, L], as given to the hash.
      lengths: not needed.
    """
    del lengths
    require(state is None, "state", "a state", "None: there is no convolution")
    return average_into(
      self.projection[...],
      hidden,
      rows,
      orders=self.orders,
      dtype=jnp.dtype(self.config.dtype),
      breaks=breaks,
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
    """The update to add to `hidden`, of its shape, and no state.

    See `average_into` for arguments and errors.
    """
    fused = self.fuse(hidden, rows, state=state, breaks=breaks, lengths=lengths)
    return fused.update, fused.state
