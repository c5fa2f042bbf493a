"""Mixture of experts with loss-free balancing (V3 §2.1.2, arXiv 2408.15664).

  s_i = sigmoid(x . e_i)                          affinity, float32
  chosen = the k experts of largest s_i + b_i     b: the balancing bias
  g_i = s_i / sum over chosen of s_j              without the bias
  y = FFN_shared(x) + sum over chosen of g_i FFN_i(x)
  b_i <- b_i + rate * sign(mean load - load_i)    after the step, no gradient

`dispatch_*` are three forms of the weighted sum over the chosen experts: the
plain one, one with a fixed capacity per expert, and one by `ragged_dot`. Axes
besides those of `types.py`:

  k  experts of a token       A  assignments, T * k, token by token
  F  hidden width of an expert
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from engram_jax.backbone.layers import (
  SwiGLU,
  normal_param,
  require_dtype,
  require_width,
)
from engram_jax.config import DISPATCHES, MoEConfig
from engram_jax.errors import require


class BalancingBias(nnx.Variable):
  """The routing bias b, float32 `[E]`.

  Not an `nnx.Param`: the forward pass only reads it, no gradient reaches it,
  and `updated_bias` gives the next one after each step.
  """


class MoEMetrics(NamedTuple):
  """What one forward pass of an expert layer reports.

  Attributes:
    load: float32 `[E]`, assignments of each expert, before any is dropped.
    dropped: float32, assignments that found their expert full.
    balance_loss: float32, sequence-wise balance loss, weight included.
  """

  load: Float32[Array, "E"]
  dropped: Float32[Array, ""]
  balance_loss: Float32[Array, ""]


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
  affinities = jax.nn.sigmoid(
    jnp.matmul(
      x.astype(jnp.float32),
      router.astype(jnp.float32),
      precision=jax.lax.Precision.HIGHEST,
    )
  )
  choice = jax.lax.stop_gradient(affinities + bias)
  expert_ids = jax.lax.top_k(choice, top_k)[1]
  chosen = jnp.take_along_axis(affinities, expert_ids, axis=1)
  weights = chosen / jnp.sum(chosen, axis=1, keepdims=True)
  return expert_ids, weights, affinities


def expert_load(
  expert_ids: Int[Array, "*batch k"], num_experts: int
) -> Int[Array, "E"]:
  """How many assignments each expert has."""
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
  """MaxVio = max load / mean load - 1; 0 is perfect balance."""
  return jnp.max(load, axis=-1) / jnp.mean(load, axis=-1) - 1


def balance_loss(
  affinities: Float[Array, "B L E"],
  expert_ids: Int[Array, "B L k"],
  *,
  weight: float,
) -> Float[Array, ""]:
  """Sequence-wise balance loss, mean over sequences (V3 Eq. 17-20).

  weight * sum_i f_i P_i, with f_i = E / (k L) * (tokens that chose i) and P_i
  the mean over the sequence of s_i / sum_j s_j. Balanced routing gives
  `weight`.
  """
  length, experts = affinities.shape[1:]
  top_k = expert_ids.shape[2]
  counts = jax.vmap(lambda ids: expert_load(ids, experts))(expert_ids)
  frequency = counts * (experts / (top_k * length))
  share = affinities / jnp.sum(affinities, axis=-1, keepdims=True)
  per_sequence = jnp.sum(frequency * jnp.mean(share, axis=1), axis=-1)
  return weight * jnp.mean(per_sequence)


def bucket_capacity(
  tokens: int, *, num_experts: int, top_k: int, factor: float
) -> int:
  """Assignments an expert takes: `factor` times the mean load, at most T."""
  require(factor > 0, "capacity_factor", factor, "a number above 0")
  return min(tokens, math.ceil(tokens * top_k * factor / num_experts))


def dispatch_dropless(
  x: Float[Array, "T D"],
  expert_ids: Int[Array, "T k"],
  weights: Float[Array, "T k"],
  gate: Float[Array, "E D F"],
  up: Float[Array, "E D F"],
  down: Float[Array, "E F D"],
) -> Float[Array, "T D"]:
  """Every expert on every token, then the weighted sum: the oracle.

  Args:
    x: `[T, D]`.
    expert_ids: `[T, k]`, different within a token.
    weights: float32 `[T, k]`.
    gate: of the experts' SwiGLU, `[E, D, F]`, in the dtype of `x`.
    up: `[E, D, F]`.
    down: `[E, F, D]`.

  Returns:
    `[T, D]` in the dtype of `x`; the sum over experts is done in float32.
  """
  tokens = jnp.arange(x.shape[0])[:, None]
  every = jnp.zeros((x.shape[0], gate.shape[0]), jnp.float32)
  every = every.at[tokens, expert_ids].add(weights)  # [T, E]
  hidden = jax.nn.silu(jnp.einsum("td,edf->etf", x, gate))
  hidden = hidden * jnp.einsum("td,edf->etf", x, up)
  out = jnp.einsum("etf,efd->etd", hidden, down)
  out = jnp.einsum("etd,te->td", out.astype(jnp.float32), every)
  return out.astype(x.dtype)


def _sort_by_expert(
  expert_ids: Int[Array, "T k"], num_experts: int
) -> tuple[Int[Array, "A"], Int[Array, "A"], Int[Array, "E"], Int[Array, "E"]]:
  """The assignments in order of their expert, earlier tokens first.

  Returns:
    The assignment at each sorted place, the sorted place of each assignment,
    the load of each expert, and its first place.
  """
  flat = expert_ids.reshape(-1)
  order = jnp.argsort(flat, stable=True)
  place = jnp.argsort(order)
  load = expert_load(expert_ids, num_experts)
  return order, place, load, jnp.cumsum(load) - load


def _combine(
  out: Float[Array, "T k D"], weights: Float[Array, "T k"]
) -> Float[Array, "T D"]:
  """Weighted sum over a token's experts, in float32."""
  total = jnp.einsum("tkd,tk->td", out.astype(jnp.float32), weights)
  return total.astype(out.dtype)


def dispatch_bucketed(
  x: Float[Array, "T D"],
  expert_ids: Int[Array, "T k"],
  weights: Float[Array, "T k"],
  gate: Float[Array, "E D F"],
  up: Float[Array, "E D F"],
  down: Float[Array, "E F D"],
  *,
  capacity: int,
) -> tuple[Float[Array, "T D"], Float32[Array, ""]]:
  """Each expert takes its first `capacity` assignments and drops the others.

  A dropped assignment adds nothing; the token's other weights stay as they
  are. Earlier tokens win, so that no token changes what an earlier one gets;
  but it may change what a later one gets, in its own sequence or in the next:
  only a capacity of T makes tokens independent of each other.

  Args:
    x: `[T, D]`; the others as in `dispatch_dropless`.
    capacity: assignments that one expert takes; see `bucket_capacity`.

  Returns:
    `[T, D]` in the dtype of `x`, and the float32 number of assignments dropped.

  Raises:
    InputError: the capacity is below 1.
  """
  require(capacity >= 1, "capacity", capacity, "1 or more")
  top_k, experts = expert_ids.shape[1], gate.shape[0]
  order, place, load, start = _sort_by_expert(expert_ids, experts)

  slot = jnp.arange(capacity)
  filled = slot < load[:, None]  # [E, C]
  # Places past the end belong to no filled slot; any row does there.
  source = order.at[start[:, None] + slot].get(mode="clip") // top_k
  buckets = jnp.where(filled[..., None], x[source], 0)  # [E, C, D]
  hidden = jax.nn.silu(jnp.einsum("ecd,edf->ecf", buckets, gate))
  hidden = hidden * jnp.einsum("ecd,edf->ecf", buckets, up)
  out = jnp.einsum("ecf,efd->ecd", hidden, down)

  slot = place.reshape(expert_ids.shape) - start[expert_ids]  # [T, k]
  kept = slot < capacity
  out = out[expert_ids, jnp.where(kept, slot, 0)]  # [T, k, D]
  y = _combine(out, jnp.where(kept, weights, 0))
  return y, jnp.sum(~kept, dtype=jnp.float32)


def dispatch_ragged(
  x: Float[Array, "T D"],
  expert_ids: Int[Array, "T k"],
  weights: Float[Array, "T k"],
  gate: Float[Array, "E D F"],
  up: Float[Array, "E D F"],
  down: Float[Array, "E F D"],
) -> Float[Array, "T D"]:
  """Drops nothing and computes nothing twice: `jax.lax.ragged_dot`.

  Arguments and result as in `dispatch_dropless`.
  """
  order, place, load, _ = _sort_by_expert(expert_ids, gate.shape[0])
  rows = x[order // expert_ids.shape[1]]  # [A, D]
  hidden = jax.nn.silu(jax.lax.ragged_dot(rows, gate, load))
  hidden = hidden * jax.lax.ragged_dot(rows, up, load)
  out = jax.lax.ragged_dot(hidden, down, load)
  return _combine(out[place].reshape(*expert_ids.shape, -1), weights)


class MoE(nnx.Module):
  """Shared experts that see every token, and routed ones that see their own."""

  def __init__(
    self,
    hidden_size: int,
    config: MoEConfig,
    *,
    init_std: float,
    dtype: str,
    rngs: nnx.Rngs,
  ):
    require_dtype(dtype)
    self.config, self.dtype = config, dtype
    experts, ffn_size = config.num_experts, config.expert_size

    def param(*shape: int) -> nnx.Param:
      return normal_param(shape, init_std=init_std, rngs=rngs)

    self.router = param(hidden_size, experts)
    self.bias = BalancingBias(jnp.zeros((experts,), jnp.float32))
    self.gate = param(experts, hidden_size, ffn_size)
    self.up = param(experts, hidden_size, ffn_size)
    self.down = param(experts, ffn_size, hidden_size)
    # The sum of several SwiGLUs is one SwiGLU of their joint hidden width.
    width = config.num_shared * ffn_size
    options = {"init_std": init_std, "dtype": dtype, "rngs": rngs}
    self.shared = SwiGLU(hidden_size, width, **options) if width else None

  def __call__(
    self, x: Float[Array, "B L D"], *, dispatch: str | None = None
  ) -> tuple[Float[Array, "B L D"], MoEMetrics]:
    """The experts' sum for every token, without the residual.

    Args:
      x: `[B, L, D]`, normed hidden states.
      dispatch: a form other than the config's. Decoding wants one that drops
        nothing, or a step would depend on its neighbours in the batch.

    Returns:
      `[B, L, D]` in the compute dtype, and the metrics.

    Raises:
      InputError: an unknown dispatch, or `x` of another width.
    """
    config = self.config
    form = config.dispatch if dispatch is None else dispatch
    valid = f"one of {', '.join(DISPATCHES)}"
    require(form in DISPATCHES, "dispatch", form, valid)
    require_width("x", x, self.router.shape[0])

    batch = x.shape[:2]
    tokens = x.reshape(-1, x.shape[-1])
    expert_ids, weights, affinities = route(
      tokens, self.router[...], self.bias[...], top_k=config.top_k
    )
    arguments = (
      tokens.astype(self.dtype),
      expert_ids,
      weights,
      *(w[...].astype(self.dtype) for w in (self.gate, self.up, self.down)),
    )
    dropped = jnp.zeros((), jnp.float32)
    if form == "dropless":
      y = dispatch_dropless(*arguments)
    elif form == "ragged":
      y = dispatch_ragged(*arguments)
    else:
      capacity = bucket_capacity(
        tokens.shape[0],
        num_experts=config.num_experts,
        top_k=config.top_k,
        factor=config.capacity_factor,
      )
      y, dropped = dispatch_bucketed(*arguments, capacity=capacity)
    y = y.reshape(x.shape)
    if self.shared is not None:
      y = y + self.shared(x)

    metrics = MoEMetrics(
      load=expert_load(expert_ids, config.num_experts).astype(jnp.float32),
      dropped=dropped,
      balance_loss=balance_loss(
        affinities.reshape(*batch, -1),
        expert_ids.reshape(*batch, -1),
        weight=config.balance_loss,
      ),
    )
    return y, metrics
