"""Manifold-constrained hyper-connections: G residual streams, mixed per token.

With x in R^(G x D) the streams of one token, x' = RMSNorm(vec(x)) and F a
sublayer with its own norm (mHC, arXiv 2512.24880):

  pre      = sigmoid(a_pre x' W_pre + b_pre)        [G]     what F reads
  post     = 2 sigmoid(a_post x' W_post + b_post)   [G]     where F writes
  residual = Sinkhorn(a_res x' W_res + b_res)       [G, G]  streams to streams
  x       <- residual x + post^T F(pre x)

Sinkhorn makes rows and columns of a positive matrix sum to 1, so that neither
the streams nor their gradients grow with depth, whatever the weights are.

The RMSNorm of x' has no gain: one gain per input is a factor of the rows of
W = [W_pre, W_post, W_res], which can hold it.

Per token these are G (G + 2) numbers, in arrays whose token axes come last: a
TPU lays the last two axes over tiles of 8 x 128, and would pad a trailing 4 x 4
to 64 times its size. Axes besides those of `types.py`:

  C  columns of W, G (G + 2)
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from engram_jax.backbone.layers import normal_param
from engram_jax.errors import require
from engram_jax.norms import normalizable
from engram_jax.parameters import param
from engram_jax.types import Hidden

#: Off the diagonal of the residual matrix's bias. Of a stream, e^-8 = 3e-4 goes
#: to each other one at the start: little over any depth, and yet not nothing,
#: for the gradient of an entry is proportional to the entry.
OFF_DIAGONAL = -8.0


class Mixing(NamedTuple):
  """How one sublayer reads and writes the streams of every token.

  Attributes:
    pre: float32 [G, B, L], in (0, 1).
    post: float32 [G, B, L], in (0, 2).
    residual: float32 [G, G, B, L], doubly stochastic; [i, j] is what stream i
      gets of stream j.
  """

  pre: Float32[Array, "G B L"]
  post: Float32[Array, "G B L"]
  residual: Float32[Array, "G G B L"]


def sinkhorn(
  logits: Float[Array, "rows columns *batch"], *, iterations: int
) -> Float32[Array, "rows columns *batch"]:
  """exp(logits), with columns and then rows scaled to sum 1, in turn.

  Rows come last and are exact, so that equal streams stay equal.
  Columns are as near to 1 as the iterations bring them. The gradient goes
  through the iterations; only `logits` is kept for it.

  Args:
    logits: [G, G, ...], any float dtype.
    iterations: scalings of the columns and of the rows, at least 1.

  Raises:
    InputError: matrices that are not square, or no iteration.
  """
  square = logits.shape[0] == logits.shape[1]
  require(square, "logits.shape", logits.shape, "[G, G, ...]")
  require(iterations >= 1, "iterations", iterations, ">= 1")
  return _sinkhorn(logits.astype(jnp.float32), iterations)


# Kept, the iterations would be 20 times the matrices; again, they cost little.
@partial(jax.checkpoint, static_argnums=1)
def _sinkhorn(logits, iterations):
  # The first iteration is done in logarithms. After it every row and column
  # has an entry of at least 1 / G^2, whatever the logits: no sum is ever 0.
  logs = jax.nn.log_softmax(logits, axis=0)
  # The difference of two logits may leave float32: a row of -inf only would
  # give 0 / 0.
  logs = jnp.maximum(logs, jnp.finfo(jnp.float32).min)
  matrix = jax.nn.softmax(logs, axis=1)

  def scale_columns_and_rows(_, matrix):
    matrix = matrix / jnp.sum(matrix, axis=0, keepdims=True)
    return matrix / jnp.sum(matrix, axis=1, keepdims=True)

  # A loop: unrolled, the gradient compiles to eight times as much code.
  return jax.lax.fori_loop(0, iterations - 1, scale_columns_and_rows, matrix)


def mixing(
  streams: Hidden,
  kernel: Float[Array, "inputs C"],
  scale: Float[Array, "parts"],
  bias: Float[Array, "columns"],
  *,
  eps: float,
  iterations: int,
) -> Mixing:
  """The `Mixing` of every token, in float32.

  Args:
    streams: [B, L, G, D], any float dtype.
    kernel: W, [G D, G (G + 2)]; columns of pre (G), post (G), residual (G G,
      row after row).
    scale: [3], a_pre, a_post, a_res.
    bias: [G (G + 2)], as the columns of `kernel`.
    eps: epsilon of the RMSNorm.
    iterations: iterations of `sinkhorn`.

  Raises:
    InputError: parameters that do not fit the streams, or no iteration.
  """
  _, _, g, d = streams.shape
  columns = g * (g + 2)
  for field, array, shape in (
    ("kernel", kernel, (g * d, columns)),
    ("scale", scale, (3,)),
    ("bias", bias, (columns,)),
  ):
    require(array.shape == shape, f"{field}.shape", array.shape, str(shape))
  # The norm is divided by after the product, which then takes the streams as
  # they are, huge ones scaled down. HIGH is the paper's precision, TF32 on a
  # GPU: one pass in bfloat16, an accelerator's default, would round `kernel` to
  # 8 bits.
  x, inverse = normalizable(streams.astype(jnp.float32), axis=(2, 3), eps=eps)
  product = jnp.einsum(
    "gdc,blgd->cbl",
    kernel.astype(jnp.float32).reshape(g, d, columns),
    x,
    precision=jax.lax.Precision.HIGH,
  )
  product *= inverse[:, :, 0, 0]
  pre, post, residual = (
    a * part + b[:, None, None]
    for a, part, b in zip(
      scale, jnp.split(product, [g, 2 * g]), jnp.split(bias, [g, 2 * g])
    )
  )
  return Mixing(
    jax.nn.sigmoid(pre),
    2 * jax.nn.sigmoid(post),
    sinkhorn(residual.reshape(g, g, *pre.shape[1:]), iterations=iterations),
  )


def read(
  streams: Hidden, pre: Float32[Array, "streams batch length"]
) -> Float[Array, "B L D"]:
  """What a sublayer reads: the sum of the streams, weighted by `pre`.

  Args:
    streams: [B, L, G, D], any float dtype.
    pre: float32 [G, B, L].

  Returns:
    [B, L, D] in the dtype of `streams`, summed in float32.

  Raises:
    InputError: a `pre` of another shape.
  """
  _require_shape("pre", pre, streams, axes=1)
  return _weighted_sum("gbl,blgd->bld", pre, streams).astype(streams.dtype)


def write(
  streams: Hidden,
  update: Float[Array, "batch length size"],
  post: Float32[Array, "streams batch length"],
  residual: Float32[Array, "rows columns batch length"],
) -> Hidden:
  """The streams after a sublayer: residual x + post^T update.

  Args:
    streams: x, [B, L, G, D], any float dtype.
    update: what the sublayer returned, [B, L, D], any float dtype.
    post: float32 [G, B, L].
    residual: float32 [G, G, B, L].

  Returns:
    [B, L, G, D] in the dtype of `streams`, summed in float32.

  Raises:
    InputError: an argument of another shape.
  """
  shape = (*streams.shape[:2], streams.shape[3])
  require(update.shape == shape, "update.shape", update.shape, str(shape))
  _require_shape("post", post, streams, axes=1)
  _require_shape("residual", residual, streams, axes=2)
  kept = _weighted_sum("ijbl,bljd->blid", residual, streams)
  written = jnp.moveaxis(post, 0, -1)[..., None] * update[:, :, None]
  return (kept + written).astype(streams.dtype)


def _weighted_sum(axes, weights, streams):
  # Spelled out as scaled streams that are added up, this is no faster on a TPU
  # (XLA makes either one pass), and on a CPU its gradient is several times
  # slower. In fewer bits, the weights would no longer sum to 1.
  return jnp.einsum(
    axes,
    weights,
    streams.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )


def _require_shape(field, weights, streams, *, axes):
  batch, length, g, _ = streams.shape
  shape = (*(g,) * axes, batch, length)
  require(weights.shape == shape, f"{field}.shape", weights.shape, str(shape))


class HyperConnections(nnx.Module):
  """Parameters of one sublayer's mixing, float32.

  It starts close to an ordinary residual: while the streams are equal, the
  sublayer reads their mean (pre = 1 / G), every stream gets its whole output
  (post = 1) and keeps itself (residual near the identity).
  """

  def __init__(
    self,
    hidden_size: int,
    streams: int,
    *,
    eps: float,
    iterations: int,
    init_std: float,
    rngs: nnx.Rngs,
  ):
    # One stream cannot start as a residual: its pre would need a bias without
    # end.
    require(streams >= 2, "streams", streams, ">= 2: one is a plain residual")
    self.eps, self.iterations = eps, iterations
    shape = (streams * hidden_size, streams * (streams + 2))
    axes = ("stream_inputs", "mixing")
    self.kernel = normal_param(
      shape, axes=axes, matrix=axes, float32=True, init_std=init_std, rngs=rngs
    )
    vector = {"decay": False, "float32": True}
    scale = jnp.full((3,), 0.01, jnp.float32)
    self.scale = param(scale, axes=("mixing_parts",), **vector)
    residual = OFF_DIAGONAL * (1 - jnp.eye(streams, dtype=jnp.float32))
    pre = jnp.full((streams,), -math.log(streams - 1), jnp.float32)
    bias = jnp.concatenate([pre, jnp.zeros(streams), residual.reshape(-1)])
    self.bias = param(bias, axes=("mixing",), **vector)

  def __call__(self, streams: Hidden) -> Mixing:
    """The `Mixing` of streams [B, L, G, D]; see `mixing`."""
    return mixing(
      streams,
      self.kernel[...],
      self.scale[...],
      self.bias[...],
      eps=self.eps,
      iterations=self.iterations,
    )
