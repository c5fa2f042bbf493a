"""The context-aware gate: how much of the memory a position lets in.

  s = RMSNorm(h) . RMSNorm(k) / sqrt(D)        per position and stream (Eq. 4)
  s <- sign(s) sqrt(max(|s|, 1e-6))            as DeepSeek's demo and V4.1
  alpha = sigmoid(s)

Eq. 4 has no second line; the released code has. It makes the gate flatter
for |s| > 1 (s = 4 gives 0.88 instead of 0.98) and steeper below (s = 0.25 gives
0.62 instead of 0.56).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from engram_jax.norms import rms_norm
from engram_jax.types import Gates, Hidden

#: Below this a score's root has no useful slope; the demo's constant.
SMALLEST_SCORE = 1e-6


def gate_scores(
  hidden: Hidden,
  keys: Hidden,
  query_scale: Float[Array, "G D"],
  key_scale: Float[Array, "G D"],
  *,
  query_eps: float,
  key_eps: float,
) -> Gates:
  """s of Eq. 4 (per stream: Eq. 6): agreement of hidden state and memory.

  Args:
    hidden: [B, L, G, D], the residual streams; any float dtype.
    keys: [B, L, G, D], the projected rows; any float dtype.
    query_scale: [G, D], gain of the hidden state's RMSNorm.
    key_scale: [G, D], gain of the key's RMSNorm.
    query_eps: epsilon of the hidden state's RMSNorm.
    key_eps: epsilon of the key's RMSNorm.

  Returns:
    float32 [B, L, G].
  """
  query = rms_norm(hidden, query_scale, eps=query_eps)
  key = rms_norm(keys, key_scale, eps=key_eps)
  return jnp.sum(query * key, axis=-1) / hidden.shape[-1] ** 0.5


def signed_square_root(scores: Gates) -> Gates:
  """sign(s) sqrt(max(|s|, 1e-6)); 0 where s is 0."""
  return jnp.sign(scores) * jnp.sqrt(
    jnp.maximum(jnp.abs(scores), SMALLEST_SCORE)
  )


def gate_values(scores: Gates, *, signed_sqrt: bool = True) -> Gates:
  """alpha: float32 [B, L, G] in (0, 1) of scores [B, L, G].

  Args:
    scores: float32 [B, L, G], from `gate_scores`.
    signed_sqrt: False is Eq. 4 to the letter.
  """
  return jax.nn.sigmoid(signed_square_root(scores) if signed_sqrt else scores)
