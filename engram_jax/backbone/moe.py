"""Mixture of experts (V3 §2.1.2): shared ones, and a few of many routed ones.

  y = FFN_shared(x) + sum over chosen of g_i FFN_i(x)

`routing.py` chooses, `dispatch.py` brings tokens to their experts and back, on
a mesh `expert_parallel.py`. Axes besides those of `types.py`:

  F  hidden width of an expert
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from engram_jax import sharding
from engram_jax.backbone import dispatch as dispatching
from engram_jax.backbone import expert_parallel
from engram_jax.backbone.layers import (
  SwiGLU,
  normal_param,
  require_dtype,
  require_width,
)
from engram_jax.backbone.routing import balance_loss, expert_load
from engram_jax.config import DISPATCHES, MoEConfig
from engram_jax.errors import require
from engram_jax.parameters import param


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

    def matrix(shape: tuple[int, ...], *axes: str, **more) -> nnx.Variable:
      # Of each expert one: Muon's matrices are an array's last two axes.
      options = {"axes": axes, "matrix": axes[-2:], "init_std": init_std}
      return normal_param(shape, rngs=rngs, **options, **more)

    self.router = matrix(
      (hidden_size, experts), "width", "router_scores", float32=True
    )
    self.bias = param(
      jnp.zeros((experts,), jnp.float32),
      axes=("router_scores",),
      decay=False,
      float32=True,
      kind=BalancingBias,
    )
    into = (experts, hidden_size, ffn_size)
    back = (experts, ffn_size, hidden_size)
    self.gate = matrix(into, *expert_parallel.INTO)
    self.up = matrix(into, *expert_parallel.INTO)
    self.down = matrix(back, *expert_parallel.BACK)
    # The sum of several SwiGLUs is one SwiGLU of their joint hidden width.
    width = config.num_shared * ffn_size
    options = {"init_std": init_std, "dtype": dtype, "rngs": rngs}
    self.shared = SwiGLU(hidden_size, width, **options) if width else None

  def __call__(
    self, x: Float[Array, "B L D"], *, dispatch: str | None = None
  ) -> tuple[Float[Array, "B L D"], MoEMetrics]:
    """The experts' sum for every token, without the residual.

    On a mesh (`sharding.current_mesh`) tokens travel to their experts: see
    `expert_parallel`. With `bucketed`, capacity and drops are then those of
    each device's part of the batch; `dropped` is their sum.

    Args:
      x: `[B, L, D]`, normed hidden states. On a mesh B divides by its batch
        axes.
      dispatch: a form other than the config's. Decoding wants one that drops
        nothing, or a step would depend on its neighbours in the batch.

    Returns:
      `[B, L, D]` in the compute dtype, and the metrics.

    Raises:
      InputError: an unknown dispatch, `x` of another width, or a mesh that
        divides neither the batch nor the experts, or has no such dispatch.
    """
    config = self.config
    form = config.dispatch if dispatch is None else dispatch
    valid = f"one of {', '.join(DISPATCHES)}"
    require(form in DISPATCHES, "dispatch", form, valid)
    require_width("x", x, self.router.shape[0])

    on_mesh = sharding.current_mesh() is not None
    apply = (expert_parallel if on_mesh else dispatching).apply_routed
    weights = (self.router, self.bias, self.gate, self.up, self.down)
    y, dropped, expert_ids, affinities = apply(
      form,
      x,
      *(w[...] for w in weights),
      top_k=config.top_k,
      capacity_factor=config.capacity_factor,
      dtype=self.dtype,
    )
    if self.shared is not None:
      y = y + self.shared(x)

    metrics = MoEMetrics(
      load=expert_load(expert_ids, config.num_experts).astype(jnp.float32),
      dropped=dropped,
      balance_loss=balance_loss(
        affinities, expert_ids, weight=config.balance_loss
      ),
    )
    return y, metrics
