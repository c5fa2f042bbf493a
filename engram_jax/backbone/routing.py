"""Which experts a token goes to, and how they are kept in balance.

  s_i = sigmoid(x . e_i)                          affinity, float32
  chosen = the k experts of largest s_i + b_i     b: the balancing bias
  g_i = s_i / sum over chosen of s_j              without the bias
  b_i <- b_i + rate * sign(mean load - load_i)    after the step, no gradient

Loss-free balancing (V3 §2.1.2, arXiv 2408.15664). Axes besides those of
`types.py`:

  k  experts of a token
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from engram_jax.errors import require

#: 1 / s and s (1 - s) of a smaller one leave float32.
_LEAST_AFFINITY = 1e-30


def route(
  x: Float[Array, "T D"],
  router: Float[Array, "D E"],
  bias: Float[Array, "E"],
  *,
  top_k: int,
) -> tuple[Int[Array, "T k"], Float32[Array, "T k"], Float32[Array, "T E"]]:
  """Chooses each token's experts and their weights, in float32.

  Args:
    x: `[T, D]`, any float dtype.
    router: `[D, E]`, one direction per expert.
    bias: `[E]`, added to the affinities for the choice alone.
    top_k: k, experts of a token.

  Returns:
    int32 expert ids `[T, k]`, float32 weights `[T, k]` of sum 1, and float32
    affinities `[T, E]`.

  Raises:
    InputError: `top_k` is not in 1..E.
  """
  experts = router.shape[1]
  require(0 < top_k <= experts, "top_k", top_k, f"1 to {experts} experts")
  # Accelerators multiply float32 in fewer bits unless told not to; here the
  # last bits decide which expert is chosen.
  logits = jnp.matmul(
    x.astype(jnp.float32),
    router.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )
  affinities = jax.nn.sigmoid(logits)
  choice = jax.lax.stop_gradient(affinities + bias)
  expert_ids = jax.lax.top_k(choice, top_k)[1]
  # Affinities underflow from logits of -88 on, and the bias may choose such
  # experts: 0 / 0. Their logarithms do not, and softmax is the same quotient.
  chosen = jnp.take_along_axis(logits, expert_ids, axis=1)
  weights = jax.nn.softmax(jax.nn.log_sigmoid(chosen), axis=1)
  return expert_ids, weights, affinities


def expert_load(
  expert_ids: Int[Array, "*batch k"], num_experts: int
) -> Int[Array, "E"]:
  """How many assignments each expert has.

  Args:
    expert_ids: integers [..., k], all in 0..E-1.
    num_experts: E, number of routed experts.
  """
  hits = expert_ids.reshape(-1, 1) == jnp.arange(num_experts)
  return jnp.sum(hits, axis=0, dtype=jnp.int32)


def updated_bias(
  bias: Float[Array, "*layers E"],
  load: Float[Array, "*layers E"],
  *,
  rate: float,
) -> Float[Array, "*layers E"]:
  """The next balancing bias: idle experts up, busy ones down, by `rate`.

  Args:
    bias: b, `[..., E]`.
    load: assignments per expert over the whole step, all devices and
      microbatches, `[..., E]`.
    rate: the size of the change.
  """
  require(rate >= 0, "rate", rate, ">= 0")
  mean = jnp.mean(load, axis=-1, keepdims=True)
  return bias + rate * jnp.sign(mean - load)


def max_violation(load: Float[Array, "*layers E"]) -> Float[Array, "*layers"]:
  """MaxVio = max load / mean load - 1; 0 is perfect balance, or no load."""
  mean = jnp.mean(load, axis=-1)
  return jnp.max(load, axis=-1) / jnp.where(mean > 0, mean, 1) - (mean > 0)


def balance_loss(
  affinities: Float[Array, "B L E"],
  expert_ids: Int[Array, "B L k"],
  *,
  weight: float,
) -> Float[Array, ""]:
  """Sequence-wise balance loss, mean over sequences (V3 Eq. 17-20).

  weight * sum_i f_i P_i, with f_i = E / (k L) * (tokens that chose i) and P_i
  the mean over the sequence of s_i / sum_j s_j. Balanced routing gives
  `weight`. An affinity below 1e-30 counts as 1e-30, and gets no gradient: so
  the share of a token that no expert suits is even, and not 0 / 0.

  Args:
    affinities: [B, L, E], the router's scores above 0.
    expert_ids: [B, L, k], the experts chosen.
    weight: factor on the loss.
  """
  length, experts = affinities.shape[1:]
  top_k = expert_ids.shape[2]
  counts = jax.vmap(lambda ids: expert_load(ids, experts))(expert_ids)
  frequency = counts * (experts / (top_k * length))
  # The gradient of a quotient holds 1 / s^2: it overflows before s is 0.
  logs = jnp.log(jnp.maximum(affinities.astype(jnp.float32), _LEAST_AFFINITY))
  share = jax.nn.softmax(logs, axis=-1)
  per_sequence = jnp.sum(frequency * jnp.mean(share, axis=1), axis=-1)
  return weight * jnp.mean(per_sequence)
