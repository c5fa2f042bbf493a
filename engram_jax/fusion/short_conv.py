"""A short depthwise causal convolution with dilation, and its decode state.

  y_t = sum over taps j of w_j * x_{t - (taps - 1 - j) * dilation}       (Eq. 5)

Each channel by itself; tap `taps - 1` is the present. Written as a sum of
shifted products: `nnx.Conv` with one group per channel is over ten times slower
on CPU, and this form needs no layout of its own on an accelerator.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from engram_jax.errors import require
from engram_jax.types import Hidden

#: The last (taps - 1) * dilation inputs, oldest first; zeros where none were.
ConvState = Float[Array, "B reach G D"]


def conv_reach(taps: int, dilation: int) -> int:
  """How many positions back the convolution sees.

  Args:
    taps: number of taps.
    dilation: positions between taps.
  """
  return (taps - 1) * dilation


def short_conv(
  x: Hidden,
  kernel: Float[Array, "taps G D"],
  *,
  dilation: int,
  state: ConvState | None = None,
  starts: Bool[Array, "B L"] | None = None,
  lengths: Int[Array, "B"] | None = None,
) -> tuple[Hidden, ConvState]:
  """Convolves along L; a chunk after a chunk equals the whole sequence.

  Args:
    x: [B, L, G, D].
    kernel: [taps, G, D].
    dilation: positions between taps.
    state: [B, (taps - 1) * dilation, G, D], returned by the call before; None
      at the start of a sequence.
    starts: bool [B, L], True at a document's first token: what lies before it
      counts as zero for it and all that follow.
    lengths: int32 [B], how many of the L positions are real; the rest is
      padding on the right and does not enter the state. At least 1; None for
      all.

  Returns:
    y [B, L, G, D] in the dtype of `x`, and the state for the next call.

  Raises:
    InputError: a state of another shape.
  """
  taps = kernel.shape[0]
  batch, length = x.shape[:2]
  reach = conv_reach(taps, dilation)
  shape = (batch, reach, *x.shape[2:])
  if state is None:
    padded = jnp.pad(x, ((0, 0), (reach, 0), (0, 0), (0, 0)))
  else:
    require(state.shape == shape, "state", state.shape, f"shape {shape}")
    padded = jnp.concatenate([state.astype(x.dtype), x], axis=1)

  if starts is not None:
    index = jnp.arange(length)
    # Where each position's document starts; -reach, the state's first position,
    # for a document that goes on from the call before.
    first = jax.lax.cummax(jnp.where(starts, index, -reach), axis=1)
    in_document = index - first  # [B, L]

  y = jnp.zeros_like(x)
  for tap in range(taps):
    back = (taps - 1 - tap) * dilation
    shifted = padded[:, reach - back : reach - back + length]
    if starts is not None and back:
      visible = (back <= in_document)[..., None, None]
      shifted = jnp.where(visible, shifted, 0)
    y = y + shifted * kernel[tap].astype(x.dtype)

  if lengths is None:
    end, new_state = length, padded[:, length:]
  else:
    end = lengths[:, None]
    new_state = jax.vmap(
      lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, reach)
    )(padded, lengths)
  if starts is not None:
    # The next chunk must not see past the last document start either.
    last_first = first[:, -1:]
    if lengths is not None:
      last_first = jnp.take_along_axis(first, end - 1, axis=1)
    position = jnp.arange(reach) + end - reach
    visible = (position >= last_first)[..., None, None]
    new_state = jnp.where(visible, new_state, 0)
  return y, new_state
