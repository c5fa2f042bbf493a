"""Root-mean-square normalisation: y = x / sqrt(mean(x^2) + eps) * scale."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

#: Numbers larger than this are scaled down by `DOWN` before they are squared.
_LARGE, _DOWN = 2.0**50, 2.0**-80
#: Smaller ones than this, where nothing is added to their squares, up.
_SMALL, _UP = 2.0**-40, 2.0**80


def power_of_two(
  largest: Float[Array, "*shape"], *, small: bool = False
) -> Float[Array, "*shape"]:
  """A factor with which squares stay within float32; 1 for ordinary numbers.

  Being a power of two, it changes no digit, and neither it nor `largest` has a
  gradient.

  Args:
    largest: float32, the largest absolute values of what is to be squared and
      summed.
    small: also scale tiny numbers up, for a norm without a noticeable `eps`.
  """
  largest = jax.lax.stop_gradient(largest)
  factor = jnp.where(largest > _LARGE, _DOWN, jnp.ones_like(largest))
  if small:
    tiny = (largest > 0) & (largest < _SMALL)
    factor = jnp.where(tiny, _UP, factor)
  return factor


def normalizable(
  x: Float[Array, "..."], *, axis: int | Sequence[int], eps: float
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
  """Two factors of an RMSNorm without a gain, of any finite `x`.

  Args:
    x: float32.
    axis: over which the mean square is taken.
    eps: added to it.

  Returns:
    x' and r, of size 1 along `axis`: x' r is x over its root mean square, and
    no square of x' overflows. x' is `x` itself where that is below 10^15.
  """
  axis = axis if isinstance(axis, int) else tuple(axis)
  factor = power_of_two(jnp.max(jnp.abs(x), axis=axis, keepdims=True))
  x = x * factor
  square = jnp.mean(x * x, axis=axis, keepdims=True)
  return x, jax.lax.rsqrt(square + eps * factor * factor)


def rms_norm(
  x: Float[Array, "... D"],
  scale: Float[Array, "... D"] | None = None,
  *,
  eps: float,
) -> Float[Array, "... D"]:
  """RMSNorm over the last axis, computed in float32.

  Args:
    x: `[..., D]`, any float dtype; no finite number is too large.
    scale: gain, broadcast against `x`; None for no gain.
    eps: added to the mean square, before the root.

  Returns:
    `[..., D]` in **float32**; the caller casts to its compute dtype.
  """
  x, inverse = normalizable(x.astype(jnp.float32), axis=-1, eps=eps)
  y = x * inverse
  return y if scale is None else y * scale.astype(jnp.float32)
