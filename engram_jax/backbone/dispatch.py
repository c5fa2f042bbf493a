"""Tokens to their experts and back: the weighted sum over the chosen ones.

  y = sum over chosen of g_i FFN_i(x)

Three forms: the plain one, one with a fixed capacity per expert, and one that
drops nothing: in sorted blocks on CPU, by `ragged_dot` elsewhere. They are for
one device; `expert_parallel.py` builds on them for a mesh. Axes besides those
of `types.py`:

  k  experts of a token       A  assignments, T * k, token by token
  F  hidden width of an expert
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from engram_jax.backbone.routing import expert_load, route
from engram_jax.errors import require


def bucket_capacity(
  tokens: int, *, num_experts: int, top_k: int, factor: float
) -> int:
  """Assignments an expert takes: `factor` times the mean load, at most T.

  Args:
    tokens: T, number of tokens that are routed at once.
    num_experts: E, number of routed experts.
    top_k: experts of one token.
    factor: capacity over the mean load.
  """
  require(factor > 0, "capacity_factor", factor, "a number above 0")
  return min(tokens, math.ceil(tokens * top_k * factor / num_experts))


def dispatch_dense(
  x: Float[Array, "T D"],
  expert_ids: Int[Array, "T k"],
  weights: Float[Array, "T k"],
  gate: Float[Array, "E D F"],
  up: Float[Array, "E D F"],
  down: Float[Array, "E F D"],
  *,
  dtype: DTypeLike | None = None,
) -> Float[Array, "T D"]:
  """Every expert on every token, then the weighted sum: the oracle.

  Args:
    x: `[T, D]`.
    expert_ids: `[T, k]`, different within a token. One that is not in 0..E-1,
      an expert of another device, counts for nothing.
    weights: float32 `[T, k]`.
    gate: gate weights of the experts' SwiGLU, `[E, D, F]`, in the dtype of `x`.
    up: `[E, D, F]`.
    down: `[E, F, D]`.
    dtype: dtype of the result; None for that of `x`.

  Returns:
    `[T, D]`; the sum over experts is done in float32.
  """
  chosen = expert_ids[..., None] == jnp.arange(gate.shape[0])  # [T, k, E]
  every = jnp.sum(jnp.where(chosen, weights[..., None], 0), axis=1)  # [T, E]
  hidden = jax.nn.silu(jnp.einsum("td,edf->etf", x, gate))
  hidden = hidden * jnp.einsum("td,edf->etf", x, up)
  out = jnp.einsum("etf,efd->etd", hidden, down)
  out = jnp.einsum("etd,te->td", out.astype(jnp.float32), every)
  return out.astype(x.dtype if dtype is None else dtype)


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
  out: Float[Array, "T k D"],
  weights: Float[Array, "T k"],
  dtype: DTypeLike | None,
) -> Float[Array, "T D"]:
  """Weighted sum over a token's experts, in float32."""
  total = jnp.einsum("tkd,tk->td", out.astype(jnp.float32), weights)
  return total.astype(out.dtype if dtype is None else dtype)


def to_buckets(
  x: Float[Array, "T D"],
  expert_ids: Int[Array, "T k"],
  *,
  num_experts: int,
  capacity: int,
) -> tuple[Float[Array, "E C D"], Int[Array, "T k"]]:
  """Lays the tokens out by expert, earlier ones first, up to the capacity.

  Args:
    x: `[T, D]`.
    expert_ids: `[T, k]`, different within a token.
    num_experts: E.
    capacity: C, assignments that one expert takes; see `bucket_capacity`.

  Returns:
    `[E, C, D]`, zeros where there is no assignment, and int32 `[T, k]`, the
    slot of each assignment in its expert's bucket: C or more if dropped.

  Raises:
    InputError: the capacity is below 1.
  """
  require(capacity >= 1, "capacity", capacity, "1 or more")
  order, place, load, start = _sort_by_expert(expert_ids, num_experts)
  slot = jnp.arange(capacity)
  filled = slot < load[:, None]  # [E, C]
  # Places past the end belong to no filled slot; any row does there.
  source = order.at[start[:, None] + slot].get(mode="clip")
  source = source // expert_ids.shape[1]
  buckets = jnp.where(filled[..., None], x[source], 0)
  return buckets, place.reshape(expert_ids.shape) - start[expert_ids]


def apply_experts(
  buckets: Float[Array, "E C D"],
  gate: Float[Array, "E D F"],
  up: Float[Array, "E D F"],
  down: Float[Array, "E F D"],
) -> Float[Array, "E C D"]:
  """Each expert's SwiGLU on its own bucket.

  Args:
    buckets: `[E, C, D]`, the tokens of each expert.
    gate: gate weights, `[E, D, F]`.
    up: `[E, D, F]`.
    down: `[E, F, D]`.
  """
  hidden = jax.nn.silu(jnp.einsum("ecd,edf->ecf", buckets, gate))
  hidden = hidden * jnp.einsum("ecd,edf->ecf", buckets, up)
  return jnp.einsum("ecf,efd->ecd", hidden, down)


def from_buckets(
  out: Float[Array, "E C D"],
  expert_ids: Int[Array, "T k"],
  slots: Int[Array, "T k"],
  weights: Float[Array, "T k"],
  *,
  dtype: DTypeLike | None = None,
) -> tuple[Float[Array, "T D"], Float32[Array, ""]]:
  """Each token's weighted sum, taken out of the buckets.

  Args:
    out: `[E, C, D]`, what the experts made of their buckets.
    expert_ids: `[T, k]`.
    slots: `[T, k]`, from `to_buckets`.
    weights: float32 `[T, k]`.
    dtype: dtype of the sums; None for that of `out`.

  Returns:
    `[T, D]`, and the float32 number of assignments dropped.
  """
  kept = slots < out.shape[1]
  out = out[expert_ids, jnp.where(kept, slots, 0)]  # [T, k, D]
  y = _combine(out, jnp.where(kept, weights, 0), dtype)
  return y, jnp.sum(~kept, dtype=jnp.float32)


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
    x: `[T, D]`.
    expert_ids: `[T, k]`.
    weights: `[T, k]`.
    gate: `[E, D, F]`, in the dtype of `x`.
    up: `[E, D, F]`.
    down: `[E, F, D]`.
    capacity: assignments that one expert takes; see `bucket_capacity`.

  Returns:
    `[T, D]` in the dtype of `x`, and the float32 number of assignments dropped.

  Raises:
    InputError: the capacity is below 1.
  """
  buckets, slots = to_buckets(
    x, expert_ids, num_experts=gate.shape[0], capacity=capacity
  )
  out = apply_experts(buckets, gate, up, down)
  return from_buckets(out, expert_ids, slots, weights)


def ragged_experts(
  rows: Float[Array, "A D"],
  load: Int[Array, "E"],
  gate: Float[Array, "E D F"],
  up: Float[Array, "E D F"],
  down: Float[Array, "E F D"],
) -> Float[Array, "A D"]:
  """Each expert's SwiGLU on its own rows, by `jax.lax.ragged_dot`.

  For accelerators: on CPU a ragged product is as many whole ones as there are
  experts.

  Args:
    rows: `[A, D]`, those of the first expert first.
    load: `[E]`, number of rows of each expert; their sum is A.
    gate: gate weights, `[E, D, F]`, in the dtype of `rows`.
    up: `[E, D, F]`.
    down: `[E, F, D]`.
  """
  hidden = jax.nn.silu(jax.lax.ragged_dot(rows, gate, load))
  hidden = hidden * jax.lax.ragged_dot(rows, up, load)
  return jax.lax.ragged_dot(hidden, down, load)


def block_size(assignments: int, num_experts: int) -> int:
  """Assignments of one block: a power of 2 near half an expert's mean load.

  Larger blocks waste products on places that are not filled, smaller ones
  weights that are read more than once.

  Args:
    assignments: A.
    num_experts: E.
  """
  mean = max(assignments // num_experts, 1)
  return min(max(1 << (mean.bit_length() - 1) >> 1, 1), 64)


def blocked_experts(
  rows: Float[Array, "A D"],
  load: Int[Array, "E"],
  gate: Float[Array, "E D F"],
  up: Float[Array, "E D F"],
  down: Float[Array, "E F D"],
) -> Float[Array, "A D"]:
  """`ragged_experts` in blocks of one size, which CPUs multiply at full speed.

  Each expert has as many blocks as its load fills, the last one in part, and a
  block brings its expert's weights along: A / b + E blocks of b are always
  enough.

  Args:
    rows: see `ragged_experts`, as for all that follow.
    load: `[E]`.
    gate: `[E, D, F]`.
    up: `[E, D, F]`.
    down: `[E, F, D]`.
  """
  assignments, experts = rows.shape[0], gate.shape[0]
  size = block_size(assignments, experts)
  blocks = assignments // size + min(experts, assignments)
  filled_blocks = -(-load // size)
  row_ends, block_ends = jnp.cumsum(load), jnp.cumsum(filled_blocks)
  first_row, first_block = row_ends - load, block_ends - filled_blocks

  def owner(ends, count):  # of blocks that hold nothing, the last expert
    found = jnp.searchsorted(ends, jnp.arange(count), side="right")
    return jnp.minimum(found, experts - 1)

  of_block, of_row = owner(block_ends, blocks), owner(row_ends, assignments)
  slot = (jnp.arange(blocks) - first_block[of_block])[:, None] * size
  slot = slot + jnp.arange(size)  # among its expert's rows
  filled = slot < load[of_block][:, None]
  source = rows.at[first_row[of_block][:, None] + slot].get(mode="clip")
  source = jnp.where(filled[..., None], source, 0)
  weights = (w[of_block] for w in (gate, up, down))
  out = apply_experts(source, *weights).reshape(blocks * size, -1)
  slot = jnp.arange(assignments) - first_row[of_row]
  return out[first_block[of_row] * size + slot]


def dispatch_dropless(
  x: Float[Array, "T D"],
  expert_ids: Int[Array, "T k"],
  weights: Float[Array, "T k"],
  gate: Float[Array, "E D F"],
  up: Float[Array, "E D F"],
  down: Float[Array, "E F D"],
  *,
  dtype: DTypeLike | None = None,
) -> Float[Array, "T D"]:
  """Drops nothing: each expert on its own tokens, all of them.

  The result is that of `dispatch_dense`. The experts are `blocked_experts` on
  CPU and `ragged_experts` elsewhere, chosen when the program is lowered.

  Args:
    x: `[T, D]`.
    expert_ids: `[T, k]`, all in 0..E-1.
    weights: `[T, k]`.
    gate: `[E, D, F]`, in the dtype of `x`.
    up: `[E, D, F]`.
    down: `[E, F, D]`.
    dtype: dtype of the result; None for that of `x`.
  """
  order, place, load, _ = _sort_by_expert(expert_ids, gate.shape[0])
  rows = x[order // expert_ids.shape[1]]  # [A, D]
  arguments = (rows, load, gate, up, down)
  out = jax.lax.platform_dependent(
    *arguments, cpu=blocked_experts, default=ragged_experts
  )
  return _combine(out[place].reshape(*expert_ids.shape, -1), weights, dtype)


def dispatch_by(
  form: str,
  x: Float[Array, "T D"],
  expert_ids: Int[Array, "T k"],
  weights: Float[Array, "T k"],
  gate: Float[Array, "E D F"],
  up: Float[Array, "E D F"],
  down: Float[Array, "E F D"],
  *,
  capacity_factor: float,
  dtype: str,
) -> tuple[Float[Array, "T D"], Float32[Array, ""]]:
  """The dispatch named `form`, one of `config.DISPATCHES`.

  Args:
    form: one of `config.DISPATCHES`.
    x: `[T, D]`.
    expert_ids: `[T, k]`.
    weights: `[T, k]`.
    gate: `[E, D, F]`.
    up: `[E, D, F]`.
    down: `[E, F, D]`.
    capacity_factor: for `bucketed`: capacity over the mean load.
    dtype: dtype to compute in.

  Returns:
    `[T, D]` in `dtype`, in which it is computed, and the float32 number of
    assignments dropped.
  """
  arguments = (
    x.astype(dtype),
    expert_ids,
    weights,
    *(w.astype(dtype) for w in (gate, up, down)),
  )
  dropped = jnp.zeros((), jnp.float32)
  if form == "dense":
    return dispatch_dense(*arguments), dropped
  if form == "dropless":
    return dispatch_dropless(*arguments), dropped
  capacity = bucket_capacity(
    x.shape[0],
    num_experts=gate.shape[0],
    top_k=expert_ids.shape[1],
    factor=capacity_factor,
  )
  return dispatch_bucketed(*arguments, capacity=capacity)


def apply_routed(
  form: str,
  x: Float[Array, "B L D"],
  router: Float[Array, "D E"],
  bias: Float[Array, "E"],
  gate: Float[Array, "_ _ _"],
  up: Float[Array, "_ _ _"],
  down: Float[Array, "_ _ _"],
  *,
  top_k: int,
  capacity_factor: float,
  dtype: str,
  dispatch: Callable[..., tuple[Array, Array]] = dispatch_by,
) -> tuple[
  Float[Array, "B L D"],
  Float32[Array, ""],
  Int[Array, "B L k"],
  Float32[Array, "B L E"],
]:
  """Routing, and the routed experts' weighted sum for every token.

  Args:
    form: one of `config.DISPATCHES`.
    x: `[B, L, D]`, any float dtype.
    router: `[D, E]`.
    bias: `[E]`, the balancing bias.
    gate: gate weights of the experts' SwiGLU, `[E, D, F]`, any float dtype; or
      whatever part of it `dispatch` takes.
    up: `[E, D, F]`, likewise.
    down: `[E, F, D]`, likewise.
    top_k: k, experts of a token.
    capacity_factor: for `bucketed`: capacity over the mean load.
    dtype: what the experts compute in.
    dispatch: takes the arguments of `dispatch_by`.

  Returns:
    The sums `[B, L, D]` in `dtype`; the float32 number of assignments dropped;
    int32 expert ids `[B, L, k]`; float32 affinities `[B, L, E]`.
  """
  batch = x.shape[:2]
  x = x.reshape(-1, x.shape[-1])
  expert_ids, weights, affinities = route(x, router, bias, top_k=top_k)
  y, dropped = dispatch(
    form,
    x,
    expert_ids,
    weights,
    gate,
    up,
    down,
    capacity_factor=capacity_factor,
    dtype=dtype,
  )
  y, expert_ids, affinities = (
    a.reshape(*batch, -1) for a in (y, expert_ids, affinities)
  )
  return y, dropped, expert_ids, affinities
