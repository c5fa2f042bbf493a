"""The weights of DeepSeek's public demo of January 2026, to and fro.

Its module of one layer holds, as `state_dict` names them (G streams):

  multi_head_embedding.embedding.weight   [R, d]        our table
  multi_head_embedding.offsets            [K]           follows from the config
  key_projs.{g}.weight, .bias             [D, M], [D]   projection[:, g]
  value_proj.weight, .bias                [D, M], [D]   projection[:, G]
  norm1.{g}.weight                        [D]           key_scale[g]
  norm2.{g}.weight                        [D]           query_scale[g]
  short_conv.norms.{g}.weight             [D]           conv_scale[g]
  short_conv.conv.weight                  [G D, 1, taps]  conv_kernel

Matrices are (out, in) there and (in, out) here; the convolution's channels are
g D + d. Nothing is rounded: what was loaded is given back byte by byte.

A `state_dict` has no place for what it is from, and the demo refuses names that
it does not know. A file of it has: safetensors' metadata takes the texts of
`WeightsIdentity.to_metadata`, and `from_metadata` finds them there again.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from engram_jax.config import EngramConfig
from engram_jax.errors import require
from engram_jax.fusion.engram import Engram, EngramParams
from engram_jax.interop.modules import engram_of, require_released_options
from engram_jax.memory.hashing import NgramHash

#: The demo's own sizes. Its RMSNorms in the gate have PyTorch's default eps.
DEMO = EngramConfig(
  hidden_size=1024,
  layers=(1, 15),
  rows_per_head=(5 * 129_280,) * 2,
  heads=8,
  head_dim=64,
  streams=4,
  pad_id=2,
  projection_bias=True,
  query_norm_eps=2.0**-23,
  key_norm_eps=2.0**-23,
)

_TABLE = "multi_head_embedding.embedding.weight"
_OFFSETS = "multi_head_embedding.offsets"
_CONV = "short_conv.conv.weight"


def load_demo(
  weights: Mapping[str, Any], config: EngramConfig, layer: int
) -> tuple[Engram, Float32[Array, "R d"]]:
  """The module and the table of one layer of the demo.

  Args:
    weights: the layer's `state_dict`: NumPy arrays, or what NumPy makes one of
      (PyTorch's tensors on the CPU). The offsets may be missing.
    config: the model's; `DEMO` for the demo as it is published.
    layer: which of `config.layers` this is: it decides the tables' sizes.

  Returns:
    The module, and the joined table, float32 [R, d].

  Raises:
    InputError: a name too few or too many, a shape or dtype that is not the
      config's, or a config that the demo has no weights for.
  """
  offsets = _head_offsets(config, layer)
  shapes = _shapes(config, layer)
  extra = sorted(set(weights) - set(shapes) - {_OFFSETS})
  require(not extra, "weights", extra, "the names of the demo's state_dict")
  arrays = {}
  for name, shape in shapes.items():
    require(name in weights, name, "missing", f"float32{list(shape)}")
    array = arrays[name] = np.asarray(weights[name])
    ok = array.shape == shape and array.dtype == np.float32
    found = f"{array.dtype}{list(array.shape)}"
    require(ok, name, found, f"float32{list(shape)}")
  if _OFFSETS in weights:
    found = np.asarray(weights[_OFFSETS]).tolist()
    same = found == offsets.tolist()
    valid = f"{offsets.tolist()}, those of layer {layer}"
    require(same, _OFFSETS, found, valid)

  streams = range(config.streams)

  def stack(name: str) -> np.ndarray:
    return np.stack([arrays[name.format(g)] for g in streams])

  def with_value(name: str) -> np.ndarray:
    value = arrays[f"value_proj.{name}"]
    return np.concatenate([stack(f"key_projs.{{}}.{name}"), value[None]])

  conv = arrays[_CONV].reshape(config.streams, config.hidden_size, -1)
  params = EngramParams(
    projection=jnp.asarray(with_value("weight").transpose(2, 0, 1)),
    key_scale=jnp.asarray(stack("norm1.{}.weight")),
    query_scale=jnp.asarray(stack("norm2.{}.weight")),
    projection_bias=jnp.asarray(with_value("bias")),
    conv_scale=jnp.asarray(stack("short_conv.norms.{}.weight")),
    conv_kernel=jnp.asarray(conv.transpose(2, 0, 1)),
  )
  # A copy: the array may lie in memory that the caller goes on to change.
  return engram_of(params, config), jnp.array(arrays[_TABLE])


def demo_weights(
  engram: Engram, table: Float[Array, "_R d"], layer: int
) -> dict[str, np.ndarray]:
  """The demo's `state_dict` of one layer: what `load_demo` takes.

  Args:
    engram: with biases and convolution, as the demo has them.
    table: [R, d]; rows beyond the R of the layer are padding, and left out.
    layer: which of the config's layers it is.

  Raises:
    InputError: a table that is too short or of another width or dtype, or a
      module that the demo has no names for.
  """
  config, offsets = engram.config, _head_offsets(engram.config, layer)
  rows, width = _shapes(config, layer)[_TABLE]
  ok = table.shape[0] >= rows and table.shape[1] == width
  ok = ok and table.dtype == jnp.float32
  found = f"{table.dtype}{list(table.shape)}"
  require(ok, "table", found, f"float32[{rows}, {width}]")
  params = EngramParams(
    **{
      name: np.asarray(value)
      for name, value in engram.params()._asdict().items()
    }
  )
  weights = {_OFFSETS: offsets, _TABLE: np.asarray(table[:rows])}
  for g in range(config.streams + 1):
    name = "value_proj" if g == config.streams else f"key_projs.{g}"
    weights[f"{name}.weight"] = params.projection[:, g].T
    weights[f"{name}.bias"] = params.projection_bias[g]
  for g in range(config.streams):
    weights[f"norm1.{g}.weight"] = params.key_scale[g]
    weights[f"norm2.{g}.weight"] = params.query_scale[g]
    weights[f"short_conv.norms.{g}.weight"] = params.conv_scale[g]
  taps = config.conv_kernel_size
  conv = params.conv_kernel.transpose(1, 2, 0).reshape(-1, 1, taps)
  weights[_CONV] = conv
  return {name: np.ascontiguousarray(x) for name, x in weights.items()}


def _shapes(config: EngramConfig, layer: int) -> dict[str, tuple[int, ...]]:
  """Shapes of the demo's weights, by name."""
  memory, d = config.memory_width, config.hidden_size
  streams, taps = config.streams, config.conv_kernel_size
  shapes = {
    _TABLE: (_hashing(config).num_rows[layer], config.head_dim),
    "value_proj.weight": (d, memory),
    "value_proj.bias": (d,),
    _CONV: (streams * d, 1, taps),
  }
  for g in range(streams):
    shapes[f"key_projs.{g}.weight"] = (d, memory)
    shapes[f"key_projs.{g}.bias"] = (d,)
    for norm in ("norm1", "norm2", "short_conv.norms"):
      shapes[f"{norm}.{g}.weight"] = (d,)
  return shapes


def _head_offsets(config: EngramConfig, layer: int) -> np.ndarray:
  """int64 [K], and that the demo could be this layer of `config`."""
  for name in ("projection_bias", "short_conv", "signed_sqrt"):
    require(getattr(config, name), name, False, "True: the demo has it")
  require_released_options(config)
  same = config.dilation == config.max_order
  valid = f"{config.max_order}, the largest n-gram order"
  require(same, "conv_dilation", config.dilation, valid)
  return _hashing(config).head_offsets(layer)


def _hashing(config: EngramConfig) -> NgramHash:
  # Of it only the primes are used, which no vocabulary changes.
  return NgramHash.create(
    vocab_size=1,
    rows_per_head=config.rows_per_head,
    heads=config.heads,
    layers=config.layers,
    pad_id=0,
  )
