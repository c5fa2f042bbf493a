"""Engram: rows and a hidden state to a residual update.

With e_t the concatenated rows of position t, per residual stream g (Eq. 3-6):

  k_t^g = W_K^g e_t + b_K^g       v_t = W_V e_t + b_V
  alpha_t^g = gate(h_t^g, k_t^g)  (gating.py)
  u_t^g = alpha_t^g v_t           table and W_V are shared by the streams
  Y^g = SiLU(conv(RMSNorm(u^g))) + u^g
  H <- H + Y                      by the caller, before its attention

W_K^1 ... W_K^G and W_V are one array, `projection`, and one product. Without
`per_stream_keys` there is one W_K for all streams, without a gate none: alpha
is 1.
`fuse` is the mathematics; `Engram` holds its parameters for flax.nnx, and
`engram_jax.linen.Engram` for flax.linen. Neither ever sees the table.

  M  width of e_t, K * d
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from engram_jax.config import EngramConfig
from engram_jax.errors import require
from engram_jax.fusion.gating import gate_scores, gate_values
from engram_jax.fusion.short_conv import ConvState, conv_reach, short_conv
from engram_jax.memory.breaks import require_breaks
from engram_jax.norms import rms_norm
from engram_jax.parameters import Metadata, param
from engram_jax.types import AnyHidden, Break, Breaks, Gates, Rows


class EngramParams(NamedTuple):
  """Arrays of one Engram layer, float32; None where an option is off.

  Attributes:
    projection: [M, O, D], the streams' W_K, then W_V: O is G + 1; 2 with one
      W_K for all streams, 1 without a gate.
    key_scale: [G, D], gain of the key's norm.
    query_scale: [G, D], gain of the hidden state's norm.
    projection_bias: [O, D], in the same order.
    conv_scale: [G, D], gain of the norm before the convolution.
    conv_kernel: [taps, G, D]; tap `taps - 1` is the present.
  """

  projection: Float[Array, "M O D"]
  key_scale: Float[Array, "G D"] | None = None
  query_scale: Float[Array, "G D"] | None = None
  projection_bias: Float[Array, "O D"] | None = None
  conv_scale: Float[Array, "G D"] | None = None
  conv_kernel: Float[Array, "taps G D"] | None = None


class Fusion(NamedTuple):
  """What `fuse` returns.

  Attributes:
    update: [B, L, G, D] in the compute dtype, to be added to the streams; or
      [B, L, D], as the hidden state was given.
    state: the convolution's state for the next call; None without one.
    gates: float32 [B, L, G], alpha.
  """

  update: AnyHidden
  state: ConvState | None
  gates: Gates


def param_shapes(config: EngramConfig) -> dict[str, tuple[int, ...]]:
  """Shapes of the `EngramParams` that `config` has, by name.

  Raises:
    InputError: a config of another fusion.
  """
  valid = "gated (input_average: fusion.over_encoding, for flax.nnx)"
  require(config.fusion == "gated", "fusion", config.fusion, valid)
  g, d, outputs = config.streams, config.hidden_size, config.outputs
  shapes = {"projection": (config.memory_width, outputs, d)}
  if config.has_gates:
    shapes |= {"key_scale": (g, d), "query_scale": (g, d)}
  if config.projection_bias:
    shapes["projection_bias"] = (outputs, d)
  if config.short_conv:
    shapes |= {
      "conv_scale": (g, d),
      "conv_kernel": (config.conv_kernel_size, g, d),
    }
  return shapes


def param_init(name: str) -> nnx.Initializer:
  """How the parameter `name` starts.

  The projections keep the scale of the rows (variance 1 / M: the paper gives
  none); norms start at 1; biases and the convolution at 0 (the paper's §2), so
  that Y starts as the gated value alone.
  """
  if name == "projection":
    # Both output axes are named: one left out would count into the fan-in.
    return nnx.initializers.variance_scaling(
      1.0, "fan_in", "normal", in_axis=0, out_axis=(1, 2)
    )
  ones = name.endswith("_scale")
  return nnx.initializers.ones if ones else nnx.initializers.zeros


def param_metadata(name: str) -> Metadata:
  """What the parameter `name` is; see `parameters.py`.

  The keys and the value are each a matrix of the whole memory. The taps
  multiply channel by channel, and are none.
  """
  if name == "projection":
    axes = ("memory", "outputs", "embed")
    return Metadata(axes, ("memory", "embed"), decay=True, float32=False)
  if name == "conv_kernel":
    axes = ("taps", "streams", "width")
    return Metadata(axes, None, decay=True, float32=False)
  first = "outputs" if name == "projection_bias" else "streams"
  return Metadata((first, "width"), None, decay=False, float32=True)


def fuse(
  params: EngramParams,
  hidden: AnyHidden,
  rows: Rows,
  *,
  dilation: int,
  signed_sqrt: bool = True,
  query_eps: float = 1e-6,
  key_eps: float = 1e-6,
  conv_eps: float = 1e-5,
  dtype: DTypeLike = jnp.float32,
  state: ConvState | None = None,
  breaks: Breaks | None = None,
  lengths: Int[Array, "B"] | None = None,
) -> Fusion:
  """The residual update of one Engram layer.

  Args:
    params: the layer's arrays. Without `conv_kernel` there is no convolution,
      without biases the projections are linear, without `query_scale` every
      gate is 1.
    hidden: [B, L, G, D], the residual streams; any float dtype. A model of one
      stream may give [B, L, D].
    rows: [B, L, K, d], what `lookup` read; any float dtype.
    dilation: positions between the convolution's taps.
    signed_sqrt: see `gating.py`.
    query_eps: epsilon of the hidden state's RMSNorm.
    key_eps: epsilon of the key's RMSNorm.
    conv_eps: epsilon of the RMSNorm before the convolution.
    dtype: dtype of products and of the update; gate and norms are float32 in
      any case.
    state: what the call before returned; None at a sequence's start.
    breaks: [B, L], as given to the hash: the convolution stops at document
      starts, and positions that are not text get gate and update 0.
    lengths: int32 [B], how many positions are real; see `short_conv`.

  Raises:
    InputError: rows or hidden state whose widths do not fit the parameters, or
      that are not of the same positions [B, L]; breaks that are none (outside
      jit).
  """
  without_axis = hidden.ndim == 3
  if without_axis:
    hidden = hidden[:, :, None]
  width = rows.shape[-2] * rows.shape[-1]
  memory, outputs, size = params.projection.shape
  per_stream = (params.query_scale, params.conv_scale)
  sizes = [len(x) for x in per_stream if x is not None]
  streams = sizes[0] if sizes else hidden.shape[2]
  valid = f"K * d = {memory}, the projections' input"
  require(width == memory, "rows", rows.shape, valid)
  valid = f"shape [B, L, {streams}, {size}]"
  require(hidden.shape[2:] == (streams, size), "hidden", hidden.shape, valid)
  valid = f"shape [{hidden.shape[0]}, {hidden.shape[1]}, K, d], as hidden's"
  require(rows.shape[:2] == hidden.shape[:2], "rows", rows.shape, valid)

  entry = rows.reshape(*rows.shape[:2], width).astype(dtype)
  weights = params.projection.astype(dtype)
  projected = jnp.einsum("blm,mgd->blgd", entry, weights)
  if params.projection_bias is not None:
    projected = projected + params.projection_bias.astype(dtype)
  keys, value = jnp.split(projected, [outputs - 1], axis=2)

  if params.query_scale is None:
    gates = jnp.ones_like(hidden[..., 0], jnp.float32)
  else:
    scores = gate_scores(
      hidden,
      jnp.broadcast_to(keys, hidden.shape),  # one key may serve all streams
      params.query_scale,
      params.key_scale,
      query_eps=query_eps,
      key_eps=key_eps,
    )
    gates = gate_values(scores, signed_sqrt=signed_sqrt)
  if breaks is not None:
    require_breaks(breaks)
    is_text = (breaks != Break.NON_TEXT)[..., None]
    gates = jnp.where(is_text, gates, 0)
  update = gates[..., None].astype(dtype) * value

  if params.conv_kernel is not None:
    normed = rms_norm(update, params.conv_scale, eps=conv_eps).astype(dtype)
    starts = None if breaks is None else breaks == Break.DOCUMENT_START
    convolved, state = short_conv(
      normed,
      params.conv_kernel,
      dilation=dilation,
      state=state,
      starts=starts,
      lengths=lengths,
    )
    update = update + jax.nn.silu(convolved)
    if breaks is not None:
      update = jnp.where(is_text[..., None], update, 0)
  if without_axis:
    update = update[:, :, 0]
  return Fusion(update, state, gates)


def fuse_options(config: EngramConfig) -> dict:
  """The keyword arguments of `fuse` that `config` determines."""
  return {
    "dilation": config.dilation,
    "signed_sqrt": config.signed_sqrt,
    "query_eps": config.query_norm_eps,
    "key_eps": config.key_norm_eps,
    "conv_eps": config.conv_norm_eps,
    "dtype": jnp.dtype(config.dtype),
  }


def init_conv_state(config: EngramConfig, batch: int) -> ConvState | None:
  """The state before the first token; None without a convolution.

  Args:
    config: sizes and options of the Engram layers.
    batch: B, number of sequences.
  """
  if not config.short_conv:
    return None
  reach = conv_reach(config.conv_kernel_size, config.dilation)
  shape = (batch, reach, config.streams, config.hidden_size)
  return jnp.zeros(shape, jnp.dtype(config.dtype))


class Engram(nnx.Module):
  """Parameters of one Engram layer, and `fuse` on them.

  Example:
    >>> engram = Engram(config, rngs=nnx.Rngs(0))
    >>> update, state = engram(hidden, lookup(table, row_ids))
    >>> hidden = hidden + update
  """

  def __init__(self, config: EngramConfig, *, rngs: nnx.Rngs):
    self.config = config
    for name, shape in param_shapes(config).items():
      value = param_init(name)(rngs.params(), shape, jnp.float32)
      setattr(self, name, param(value, **param_metadata(name)._asdict()))

  def params(self) -> EngramParams:
    """The layer's arrays."""
    names = param_shapes(self.config)
    return EngramParams(**{name: getattr(self, name)[...] for name in names})

  def fuse(
    self,
    hidden: AnyHidden,
    rows: Rows,
    *,
    state: ConvState | None = None,
    breaks: Breaks | None = None,
    lengths: Int[Array, "B"] | None = None,
  ) -> Fusion:
    """As `__call__`, with the gates.

    Args:
      hidden: [B, L, G, D] or [B, L, D]; any float dtype.
      rows: [B, L, K, d]; any float dtype.
      state: what the call before returned; None at a sequence's start.
      breaks: [B, L], as given to the hash.
      lengths: int32 [B], number of real positions.
    """
    return fuse(
      self.params(),
      hidden,
      rows,
      state=state,
      breaks=breaks,
      lengths=lengths,
      **fuse_options(self.config),
    )

  def __call__(
    self,
    hidden: AnyHidden,
    rows: Rows,
    *,
    state: ConvState | None = None,
    breaks: Breaks | None = None,
    lengths: Int[Array, "B"] | None = None,
  ) -> tuple[AnyHidden, ConvState | None]:
    """The update to add to `hidden`, of its shape, and the decode state.

    See `fuse` (the function) for arguments and errors.
    """
    fused = self.fuse(hidden, rows, state=state, breaks=breaks, lengths=lengths)
    return fused.update, fused.state
