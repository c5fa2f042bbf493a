"""LogitLens: how far each depth is from the model's own prediction (§5).

  D_l = KL(p_l || p_n) = sum_v p_l(v) (ln p_l(v) - ln p_n(v))

p_l is what the last norm and the head make of the hidden state after block l;
p_n is the model's output. A block that leaves little to do for those above it
has a small D_l.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from engram_jax.backbone.transformer import Transformer


def kl_divergence(
  log_p: Float[Array, "*shape V"], log_q: Float[Array, "*shape V"]
) -> Float[Array, "*shape"]:
  """KL(p || q) in nats.

  Args:
    log_p: logarithms of probabilities, each row of which add up to 1.
    log_q: the same of the other distributions.
  """
  return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def lens_divergences(
  model: Transformer, states: Float[Array, "depths B L D"]
) -> Float32[Array, "depths B L"]:
  """D_l of every token, in nats.

  The logits of one depth exist at a time.

  Args:
    model: whose last norm and head are the lens.
    states: from `hidden_states`; the last are those of the output.

  Returns:
    float32 [depths, B, L]; the last entry is 0.
  """

  def log_probabilities(state):
    return jax.nn.log_softmax(model.logits(model.norm(state)))

  output = log_probabilities(states[-1])
  return jax.lax.map(
    lambda state: kl_divergence(log_probabilities(state), output), states
  )
