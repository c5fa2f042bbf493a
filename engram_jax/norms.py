"""Root-mean-square normalisation: y = x / sqrt(mean(x^2) + eps) * scale."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
  x: Float[Array, "... D"],
  scale: Float[Array, "... D"] | None = None,
  *,
  eps: float,
) -> Float[Array, "... D"]:
  """RMSNorm over the last axis, computed in float32.

  Args:
    x: `[..., D]`, any float dtype.
    scale: gain, broadcast against `x`; None for no gain.
    eps: added to the mean square, before the root.

  Returns:
    `[..., D]` in **float32**; the caller casts to its compute dtype.
  """
  x = x.astype(jnp.float32)
  y = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
  return y if scale is None else y * scale.astype(jnp.float32)
