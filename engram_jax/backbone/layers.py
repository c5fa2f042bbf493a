"""The small layers of the backbone: norm, SwiGLU, embedding, rotary positions.

  RMSNorm    y = x / sqrt(mean(x^2) + eps) * scale
  SwiGLU     y = (silu(x W_gate) * x W_up) W_down
  Embedding  h = W[token]
  logits     h W^T, of the head or of the embedding tied to it
  rotary     (a, b) -> (a cos - b sin, b cos + a sin) at angle p * theta_i

Parameters are float32; the compute dtype is a field. Axes besides those of
`types.py`:

  F  hidden width of a SwiGLU      P  rotary width, even
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from engram_jax import sharding
from engram_jax.config import DTYPES
from engram_jax.errors import require, require_in_range
from engram_jax.norms import rms_norm
from engram_jax.parameters import param

#: Axes of an embedding's table and of a head, [V, D].
VOCABULARY = ("vocab", "embed")


def normal_param(
  shape: tuple[int, ...], *, init_std: float, rngs: nnx.Rngs, **metadata: Any
) -> nnx.Variable:
  """A float32 parameter drawn from a normal distribution of mean 0.

  Args:
    shape: shape of the array.
    init_std: standard deviation.
    rngs: the stream `params` is drawn from.
    **metadata: what the parameter is, as `parameters.param` takes it.
  """
  draw = jax.random.normal(rngs.params(), shape, jnp.float32)
  return param(init_std * draw, **metadata)


def require_dtype(dtype: str) -> None:
  """Refuses a compute dtype that is not one of `config.DTYPES`."""
  require(dtype in DTYPES, "dtype", dtype, f"one of {', '.join(DTYPES)}")


def require_width(field: str, x: Float[Array, "..."], width: int) -> None:
  """Refuses an array whose last axis is not `width` wide.

  Args:
    field: name of the array, for the error line.
    x: the array to check.
    width: size that its last axis must have.
  """
  require(x.shape[-1] == width, f"{field}.shape", x.shape, f"[..., {width}]")


def swiglu(
  x: Float[Array, "... D"],
  gate: Float[Array, "D F"],
  up: Float[Array, "D F"],
  down: Float[Array, "F D"],
) -> Float[Array, "... D"]:
  """(silu(x gate) * x up) down, in the dtype of its arguments.

  Args:
    x: [..., D].
    gate: [D, F].
    up: [D, F].
    down: [F, D].
  """
  return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def rotary_frequencies(dim: int, theta: float) -> Float[Array, "half"]:
  """Angle per position of each rotary pair: theta^(-2i / dim).

  Args:
    dim: P, rotary width, even.
    theta: base of the frequencies.

  Returns:
    float32 `[P / 2]`, radians per position.

  Raises:
    InputError: `dim` is odd.
  """
  require(dim % 2 == 0, "rotary width", dim, "an even number")
  return theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)


def rotary(
  x: Float[Array, "B L heads P"],
  positions: Int[Array, "B L"],
  frequencies: Float[Array, "half"],
) -> Float[Array, "B L heads P"]:
  """Rotates each pair of features by an angle proportional to the position.

  Pairs are half-split: feature i turns with feature i + P/2 (interleaved
  checkpoints, where 2i turns with 2i + 1, need their columns reordered). So
  the product of a rotated query and key depends only on their distance.

  Args:
    x: `[B, L, heads, P]`, any float dtype.
    positions: int `[B, L]`; they restart in every document.
    frequencies: float32 `[P / 2]`, radians per position of each pair:
      `rotary_frequencies`, or `yarn.yarn_frequencies` for a longer model.

  Returns:
    `[B, L, heads, P]` in the dtype of `x`; the rotation is done in float32.
  """
  angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class RMSNorm(nnx.Module):
  """RMSNorm with a gain, in float32; the result has the input's dtype."""

  def __init__(self, size: int, *, eps: float):
    self.eps = eps
    ones = jnp.ones((size,), jnp.float32)
    self.scale = param(ones, axes=("width",), decay=False, float32=True)

  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    require_width("x", x, self.scale.shape[-1])
    return rms_norm(x, self.scale[...], eps=self.eps).astype(x.dtype)


class SwiGLU(nnx.Module):
  """Gated feed-forward layer of hidden width `ffn_size`, without biases."""

  def __init__(
    self,
    hidden_size: int,
    ffn_size: int,
    *,
    init_std: float,
    dtype: str,
    rngs: nnx.Rngs,
  ):
    require_dtype(dtype)
    self.dtype = dtype
    into, back = (hidden_size, ffn_size), (ffn_size, hidden_size)

    def matrix(shape: tuple[int, int], *axes: str) -> nnx.Variable:
      options = {"axes": axes, "matrix": axes, "init_std": init_std}
      return normal_param(shape, rngs=rngs, **options)

    self.gate = matrix(into, "embed", "mlp")
    self.up = matrix(into, "embed", "mlp")
    self.down = matrix(back, "mlp", "embed")

  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """`[..., D]` to `[..., D]` in the compute dtype."""
    require_width("x", x, self.gate.shape[-2])
    weights = (self.gate, self.up, self.down)
    return swiglu(
      x.astype(self.dtype),
      *(weight[...].astype(self.dtype) for weight in weights),
    )


class Embedding(nnx.Module):
  """Token embedding; its table may serve as output head too."""

  def __init__(
    self,
    vocab_size: int,
    hidden_size: int,
    *,
    init_std: float,
    dtype: str,
    rngs: nnx.Rngs,
  ):
    require_dtype(dtype)
    self.dtype = dtype
    shape = (vocab_size, hidden_size)
    self.table = normal_param(
      shape, axes=VOCABULARY, init_std=init_std, rngs=rngs
    )

  def __call__(self, token_ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    """Rows of the table, in the compute dtype.

    Raises:
      InputError: a concrete id outside `0 <= id < V`.
    """
    vocab_size = self.table.shape[-2]
    require_in_range("token_ids", token_ids, low=0, high=vocab_size)
    return embed(self.table[...], token_ids, dtype=self.dtype)


def embed(
  table: Float[Array, "V D"], token_ids: Int[Array, "B L"], *, dtype: str
) -> Float[Array, "B L D"]:
  """Rows of `table` in `dtype`; its gradient is summed in its own.

  On a mesh each device gathers the table, reads its own tokens, and sums their
  gradient before any of it travels.

  Args:
    table: [V, D], the embedding.
    token_ids: int32 [B, L], 0 <= id < V.
    dtype: dtype of the result.
  """
  # Gathered before the cast, so that only the rows that are read are cast.
  mesh = sharding.current_mesh()
  if mesh is None or sharding.is_explicit(mesh):
    return table[token_ids].astype(dtype)
  spec = sharding.parameter_spec(VOCABULARY, table.shape, mesh)

  def local(table, token_ids):
    whole = sharding.gathered(table, spec, dtype=dtype)
    return whole[token_ids].astype(dtype)

  return jax.shard_map(
    local, in_specs=(spec, sharding.TOKENS), out_specs=sharding.TOKENS
  )(table, token_ids)


def logits_of(
  hidden: Float[Array, "B L D"], matrix: Float[Array, "V D"]
) -> Float[Array, "B L V"]:
  """Logits of every token, float32; products in the dtype of `hidden`.

  Args:
    hidden: `[B, L, D]`, after the final norm.
    matrix: `[V, D]`, the head's or the embedding's.
  """
  require_width("hidden", hidden, matrix.shape[-1])
  matrix = sharding.constrain(matrix.astype(hidden.dtype), sharding.WHOLE)
  return jnp.einsum(
    "bld,vd->blv", hidden, matrix, preferred_element_type=jnp.float32
  )
