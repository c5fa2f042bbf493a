"""The loss of the next token, from logits or without them.

  loss = sum over tokens t where mask_t of  log sum_v exp(z_tv) - z_t,target_t
  z = h W^T, accumulated in float32

Logits [B, L, V] may be more bytes than all else in a step.
`chunked_cross_entropy` makes those of a chunk of tokens at a time, [chunk, V],
and makes them again for the gradient.

On a mesh each device takes its own tokens; the devices of a tensor group, which
hold the same ones, take a part of the sequence each. The matrix is gathered
once, before the loop over chunks, and its gradient is sent once, after it.

Axes besides those of `types.py`: T, tokens of one device.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int

from engram_jax import sharding
from engram_jax.backbone.layers import VOCABULARY
from engram_jax.backbone.transformer import ModelOutput, Transformer
from engram_jax.errors import require
from engram_jax.sharding import (
  AXES,
  BATCH,
  TENSOR,
  TOKENS_BY_DEVICE,
)


def cross_entropy(
  logits: Float[Array, "*S V"],
  targets: Int[Array, "*S"],
  mask: Bool[Array, "*S"],
) -> Float[Array, ""]:
  """Sum of -log p(target) over the positions where `mask` is True, in nats.

  Args:
    logits: [..., V], any float dtype.
    targets: int [...], ids below V.
    mask: bool [...], which positions count.
  """
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  return jnp.sum(jnp.where(mask, losses, 0))


def chunked_cross_entropy(
  hidden: Float[Array, "B L D"],
  matrix: Float[Array, "V D"],
  targets: Int[Array, "B L"],
  mask: Bool[Array, "B L"],
  *,
  chunk: int,
  dtype: str,
) -> Float32[Array, ""]:
  """`cross_entropy` of the logits `hidden @ matrix.T`, which never exist whole.

  The gradient of the matrix is summed over chunks and devices in the matrix's
  own dtype. As with whole logits, a masked position adds nothing to the loss
  whatever it holds, but one that is not finite spoils the gradients.

  Args:
    hidden: `[B, L, D]`, after the last norm, in the compute dtype.
    matrix: `[V, D]`, the output head, in the parameter's dtype; on a mesh
      split along `layers.VOCABULARY`, where that divides it.
    targets: int32 `[B, L]`, ids below V.
    mask: `[B, L]`, which positions count.
    chunk: tokens of one device whose logits exist at a time. The last chunk
      is filled up, and none is larger than there are tokens.
    dtype: dtype in which the matrix is used.

  Returns:
    float32, nats.

  Raises:
    InputError: a chunk of less than one token, or a batch or length that the
      mesh does not divide.
  """
  require(chunk >= 1, "chunk", chunk, "an integer >= 1")
  sum_chunks = functools.partial(_sum_chunks, chunk=chunk, dtype=dtype)
  mesh = sharding.current_mesh()
  if mesh is None:
    return jnp.sum(sum_chunks(hidden, matrix, targets, mask))
  for field, value, axes in (
    ("hidden.shape[0]", hidden.shape[0], BATCH),
    ("hidden.shape[1]", hidden.shape[1], (TENSOR,)),
  ):
    by = sharding.size(mesh, *axes)
    names = " * ".join(f"mesh.{axis}" for axis in axes)
    require(value % by == 0, field, value, f"a multiple of {names} = {by}")
  of_matrix = sharding.parameter_spec(VOCABULARY, matrix.shape, mesh)

  def of_device(hidden, matrix, targets, mask):
    # What is marked here is where the matrix's gradient is summed over devices.
    matrix = lax.pcast(matrix, TENSOR, to="varying")
    matrix = sharding.gathered(matrix, of_matrix, dtype=dtype)
    return lax.psum(jnp.sum(sum_chunks(hidden, matrix, targets, mask)), AXES)

  specs = (TOKENS_BY_DEVICE, of_matrix, TOKENS_BY_DEVICE, TOKENS_BY_DEVICE)
  arrays = (hidden, matrix, targets, mask)
  placed = [sharding.constrain(x, spec) for x, spec in zip(arrays, specs)]
  return jax.shard_map(of_device, in_specs=specs, out_specs=P())(*placed)


def _sum_chunks(
  hidden: Float[Array, "b l D"],
  matrix: Float[Array, "V D"],
  targets: Int[Array, "b l"],
  mask: Bool[Array, "b l"],
  *,
  chunk: int,
  dtype: str,
) -> Float32[Array, "n"]:
  """The loss of each chunk of one device's tokens."""
  tokens = targets.size
  chunk = min(chunk, tokens)
  rest = -tokens % chunk

  def cut(x):
    x = x.reshape(tokens, *x.shape[2:])
    x = jnp.pad(x, [(0, rest)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, chunk, *x.shape[1:])

  def of_chunk(_, piece):
    hidden, targets, mask = piece
    # Cast here, so that the gradients of all chunks are summed in the
    # parameter's dtype.
    logits = jnp.einsum(
      "td,vd->tv",
      hidden,
      matrix.astype(dtype),
      preferred_element_type=jnp.float32,
    )
    return None, cross_entropy(logits, targets, mask)

  # In a loop nothing can be merged with the first computation.
  again = jax.checkpoint(of_chunk, prevent_cse=False)
  return lax.scan(again, None, tuple(map(cut, (hidden, targets, mask))))[1]


def mean_model_loss(
  model: Transformer,
  rows: Mapping[int, Array] | None,
  batch: Mapping[str, Array],
) -> Float[Array, ""]:
  """The model's mean loss over a batch's targets, no token dropped.

  For what trains beside a frozen model; a batch without a target has loss 0.

  Args:
    model: the transformer.
    rows: as the model takes them.
    batch: see `model_loss`.
  """
  dispatch = model.config.exact_dispatch
  total, _ = model_loss(model, rows, batch, chunk=0, dispatch=dispatch)
  return total / jnp.maximum(jnp.sum(batch["loss_mask"]), 1)


def model_loss(
  model: Transformer,
  rows: Mapping[int, Array] | None,
  batch: Mapping[str, Array],
  *,
  chunk: int,
  **options: Any,
) -> tuple[Float[Array, ""], ModelOutput]:
  """The model's loss on a batch, summed over its targets, and its output.

  Args:
    model: the transformer.
    rows: as the model takes them.
    batch: `inputs`, `targets`, `breaks`, `loss_mask`, each [B, L].
    chunk: `TrainConfig.loss_chunk`; with 0 the output holds logits.
    **options: further keyword arguments of the model's call.
  """
  out = model(
    batch["inputs"],
    rows,
    breaks=batch["breaks"],
    logits=not chunk,
    **options,
  )
  targets, mask = batch["targets"], batch["loss_mask"]
  if not chunk:
    return cross_entropy(out.logits, targets, mask), out
  total = chunked_cross_entropy(
    out.hidden,
    model.output_matrix(),
    targets,
    mask,
    chunk=chunk,
    dtype=model.config.dtype,
  )
  return total, out
