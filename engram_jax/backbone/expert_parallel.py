"""The routed experts over a mesh: tokens travel to their experts and back.

Left to the compiler, choosing experts and sorting by them would gather the
tokens of the whole batch on every device. So both happen inside one
`shard_map`: each device routes its part of the batch as one device routes the
whole, and holds E / n of the experts, of these its slice of the hidden width F.

  dense     all_gather of the group's tokens; own experts on all of them;
            reduce-scatter of the sums to the tokens' owners. Exact under any
            load, for n times the memory: the oracle on a mesh
  bucketed  own tokens to buckets [E, C, D]; all_to_all; own experts on
            [E / n, n C, D]; all_to_all; own tokens' sums out of the buckets
  dropless  as on one device; there is none for n > 1

What a device has then is the sum over its slice of F; the slices are added
last, when a token is one row again and not one for each of its experts. Axes
besides those of `types.py` and `dispatch.py`:

  n  devices of an expert group     C  capacity, of one device's tokens
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int

from engram_jax import sharding
from engram_jax.backbone import dispatch
from engram_jax.errors import require
from engram_jax.sharding import BATCH, EXPERT, TENSOR, TOKENS

#: Axes of the experts' gate and up, [E, D, F], and of down, [E, F, D]. The
#: arrays are gathered here, along `data`.
INTO, BACK = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")


def apply_routed(
  form: str,
  x: Float[Array, "B L D"],
  router: Float[Array, "D E"],
  bias: Float[Array, "E"],
  gate: Float[Array, "E D F"],
  up: Float[Array, "E D F"],
  down: Float[Array, "E F D"],
  *,
  top_k: int,
  capacity_factor: float,
  dtype: str,
) -> tuple[
  Float[Array, "B L D"],
  Float32[Array, ""],
  Int[Array, "B L k"],
  Float32[Array, "B L E"],
]:
  """`dispatch.apply_routed` on the current mesh, each device on its own tokens.

  To be traced for a mesh: `sharding.use`, or `jax.set_mesh`.

  Args:
    form: one of `config.DISPATCHES`.
    x: `[B, L, D]`; B divides by the mesh's batch axes.
    router: `[D, E]`, on every device.
    bias: `[E]`, on every device.
    gate: `[E, D, F]`, split as `sharding.LOGICAL_AXES` have it. In the
      parameter's dtype: the device casts its part.
    up: `[E, D, F]`.
    down: `[E, F, D]`.
    top_k: k, experts of a token.
    capacity_factor: for `bucketed`: capacity over the mean load. Both are those
      of one device's tokens: an expert takes C from each device, and drops what
      is over even if others send it less.
    dtype: what the experts compute in.

  Returns:
    As `dispatch.apply_routed`, split over the batch; the number of assignments
    dropped is that of all devices.

  Raises:
    InputError: no mesh, an unknown form, one that this mesh does not have, or
      a size that it does not divide.
  """
  mesh = sharding.current_mesh()
  valid = f"one of the axes {', '.join(sharding.AXES)}, by sharding.use"
  require(mesh is not None, "mesh", None, valid)
  require(form in FORMS, "dispatch", form, f"one of {', '.join(FORMS)}")
  devices = sharding.size(mesh, EXPERT)
  valid = f"bucketed or dense with mesh.expert = {devices}"
  require(form != "dropless" or devices == 1, "dispatch", form, valid)
  for field, value, axes in (
    ("x.shape[0]", x.shape[0], BATCH),
    ("num_experts", gate.shape[0], (EXPERT,)),
    ("expert_size", gate.shape[2], (TENSOR,)),
  ):
    by = sharding.size(mesh, *axes)
    names = " * ".join(f"mesh.{axis}" for axis in axes)
    require(value % by == 0, field, value, f"a multiple of {names} = {by}")

  into = sharding.parameter_spec(INTO, gate.shape, mesh)
  back = sharding.parameter_spec(BACK, down.shape, mesh)
  local = partial(
    dispatch.apply_routed,
    form,
    top_k=top_k,
    capacity_factor=capacity_factor,
    dtype=dtype,
    dispatch=partial(_dispatch_by, specs=(into, into, back)),
  )
  return jax.shard_map(
    local,
    in_specs=(TOKENS, P(), P(), into, into, back),
    out_specs=(TOKENS, P(), TOKENS, TOKENS),
  )(x, router, bias, gate, up, down)


# --- on one device, inside shard_map ---


def _dispatch_by(
  form, x, expert_ids, weights, *stacks, capacity_factor, dtype, specs
):
  """`dispatch.dispatch_by`, with experts and slices of F on other devices."""
  # What is marked here is where the backward pass sums over `tensor`. Left to
  # the first product, that would be while a token is k rows.
  x, weights = lax.pcast((x.astype(dtype), weights), TENSOR, to="varying")
  stacks = [
    sharding.gathered(w, spec, dtype=dtype).astype(dtype)
    for w, spec in zip(stacks, specs)
  ]
  y, dropped = FORMS[form](
    x, expert_ids, weights, *stacks, capacity_factor=capacity_factor
  )
  return lax.psum(y, TENSOR).astype(dtype), dropped


def _dense(x, expert_ids, weights, *stacks, capacity_factor):
  """Tokens [T, D] to float32 sums over this slice of F, and drops."""
  del capacity_factor
  gather = partial(lax.all_gather, axis_name=EXPERT, tiled=True)
  first = lax.axis_index(EXPERT) * stacks[0].shape[0]
  y = dispatch.dispatch_dense(
    gather(x),
    gather(expert_ids) - first,
    gather(weights),
    *stacks,
    dtype=jnp.float32,
  )
  return lax.psum_scatter(y, EXPERT, tiled=True), jnp.zeros((), jnp.float32)


def _bucketed(x, expert_ids, weights, *stacks, capacity_factor):
  """As `_dense`, within a capacity."""
  num_experts = stacks[0].shape[0] * lax.axis_size(EXPERT)
  capacity = dispatch.bucket_capacity(
    x.shape[0],
    num_experts=num_experts,
    top_k=expert_ids.shape[1],
    factor=capacity_factor,
  )
  swap = partial(lax.all_to_all, axis_name=EXPERT, tiled=True)
  buckets, slots = dispatch.to_buckets(
    x, expert_ids, num_experts=num_experts, capacity=capacity
  )
  buckets = swap(buckets, split_axis=0, concat_axis=1)  # [E / n, n C, D]
  out = dispatch.apply_experts(buckets, *stacks)
  out = swap(out, split_axis=1, concat_axis=0)  # [E, C, D]
  y, dropped = dispatch.from_buckets(
    out, expert_ids, slots, weights, dtype=jnp.float32
  )
  return y, lax.psum(dropped, BATCH)


def _dropless(x, expert_ids, weights, *stacks, capacity_factor):
  """As `_dense`, where all experts are on this device."""
  del capacity_factor
  y = dispatch.dispatch_dropless(
    x, expert_ids, weights, *stacks, dtype=jnp.float32
  )
  return y, jnp.zeros((), jnp.float32)


FORMS = {"dense": _dense, "bucketed": _bucketed, "dropless": _dropless}
