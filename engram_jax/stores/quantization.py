"""Packed rows: one row's values, then its scales, side by side in bytes.

  float32    4 d bytes            the values
  bfloat16   2 d bytes            the values, rounded to nearest even
  fp8        d + d / 32 bytes     x = value * 2^(byte - 127), a byte per block
                                  of 32 columns; value in e4m3fn. V4.1's rows
  int8       d + 4 bytes          x = value * scale, a float32 scale per row

One read thus brings a row whole, and what travels to the device are these
bytes: 264 for an fp8 row of width 256, where float32 has 1024.

Every function takes NumPy arrays (on the host, NumPy out) and JAX arrays (on
the device, under jit), with the same bits. XLA flushes subnormal numbers to
zero in its arithmetic and NumPy does not, so on the device fp8 is coded and
decoded in integers, and int8 is so defined that no subnormal number appears.

fp8, to the last bit. A scale byte b is 2^(b - 127), byte 0 is 2^-127 and byte
255 is NaN (OCP's E8M0). Engines that shift the byte into a float32's exponent
read byte 0 as 0 instead; `pack_rows` never writes it. A product is exact in
float32, infinite beyond its range, and rounded once to bfloat16. NaN is the
positive quiet NaN. What may be relied on, for finite rows:

  - Packing with the scales that a row had (`scales`) gives its bytes again.
  - Without them it chooses, per block, the smallest power of two >= 2^-126 that
    brings the largest entry to 448 or below. A block whose scale was that gives
    its bytes again, any other the same numbers in other bytes. (Only of scale
    byte 0 an odd multiple of 2^-136 is lost.)

Axes besides those of `types.py`:

  S  any leading axes           n  bytes of a packed row
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped, UInt8

from engram_jax.errors import require

FORMATS = ("float32", "bfloat16", "fp8", "int8")
#: Columns that share a scale in fp8.
BLOCK = 32

_MAX_E4M3 = 448.0
_TINY = np.float32(2.0**-126)  # the smallest normal float32
_NAN_BITS = np.uint32(0x7FC00000)
_INF_BITS = np.uint32(0x7F800000)
_SIGN = np.uint32(0x80000000)
# Of 1 / 127 and this number, this is the smaller: see `_int8_scales`.
_PER_127 = np.float32(1 / 127)
# Of 16 significant bits, the largest whose product with 127 is finite.
_MAX_INT8_SCALE = np.uint32(0x7C010200).view(np.float32)


@dataclasses.dataclass(frozen=True)
class RowFormat:
  """How a row of d numbers lies in bytes.

  Attributes:
    name: one of `FORMATS`.
    width: d; a multiple of 32 for fp8.

  Raises:
    InputError: an unknown name or an impossible width.
  """

  name: str
  width: int

  def __post_init__(self):
    require(self.name in FORMATS, "format", self.name, " or ".join(FORMATS))
    valid, divisor = "an integer >= 1", 1
    if self.name == "fp8":
      valid, divisor = f"a positive multiple of {BLOCK} for fp8", BLOCK
    ok = self.width >= 1 and self.width % divisor == 0
    require(ok, "width", self.width, valid)

  @property
  def bytes_per_row(self) -> int:
    """n, values and scales."""
    d = self.width
    sizes = {"float32": 4 * d, "bfloat16": 2 * d, "int8": d + 4}
    return sizes.get(self.name, d + d // BLOCK)


def pack_rows(
  rows: Float[Array | np.ndarray, "*S d"],
  row_format: RowFormat,
  *,
  scales: UInt8[Array | np.ndarray, "*S blocks"] | None = None,
) -> UInt8[Array | np.ndarray, "*S n"]:
  """Rows of numbers to bytes.

  Args:
    rows: [..., d], any float dtype; taken as float32.
    row_format: format of the result.
    scales: uint8 [..., d / 32], the scale bytes to use (fp8 only); None
      chooses them. Entries beyond 448 times their scale become 448 times it.

  Returns:
    uint8 [..., bytes_per_row]; NumPy if `rows` is.

  Raises:
    InputError: another width, scales for a format without them, or (NumPy
      only: JAX arrays are not looked at) an entry not finite in float32.
  """
  xp = _namespace(rows)
  require(
    rows.shape[-1] == row_format.width,
    "rows.shape",
    rows.shape,
    f"width {row_format.width} at the end",
  )
  with np.errstate(over="ignore"):
    rows = rows.astype(np.float32)
  if xp is np and not np.isfinite(rows).all():
    wrong = rows[~np.isfinite(rows)].flat[0]
    require(False, "rows", wrong, "finite numbers")
  name = row_format.name
  if scales is not None:
    require(name == "fp8", "scales", f"given for {name}", "fp8 rows only")
    wanted = (*rows.shape[:-1], row_format.width // BLOCK)
    ok = scales.shape == wanted and scales.dtype == np.uint8
    found = f"{scales.dtype}{list(scales.shape)}"
    require(ok, "scales", found, f"uint8{list(wanted)}")
  if name == "bfloat16":
    return _bytes(_rounded(rows, jnp.bfloat16))
  if name == "float32":
    return _bytes(rows)
  if name == "int8":
    return _pack_int8(rows)
  return _pack_fp8(rows, scales)


def unpack_rows(
  packed: UInt8[Array | np.ndarray, "*S n"],
  row_format: RowFormat,
  dtype: DTypeLike = jnp.float32,
) -> Float[Array | np.ndarray, "*S d"]:
  """Bytes to rows of numbers.

  Args:
    packed: uint8 [..., bytes_per_row].
    row_format: what they are.
    dtype: float32, or bfloat16 for the same rounded once.

  Returns:
    [..., d] of `dtype`; NumPy if `packed` is.

  Raises:
    InputError: bytes of another length, or another dtype.
  """
  xp, d, name = _namespace(packed), row_format.width, row_format.name
  valid = f"uint8, {row_format.bytes_per_row} at the end"
  ok = packed.dtype == np.uint8
  ok = ok and packed.shape[-1:] == (row_format.bytes_per_row,)
  require(ok, "packed", f"{packed.dtype}{list(packed.shape)}", valid)
  known = jnp.dtype(dtype) in (jnp.float32, jnp.bfloat16)
  require(known, "dtype", jnp.dtype(dtype), "float32 or bfloat16")
  if name == "float32":
    rows = packed.view(np.float32)
  elif name == "bfloat16":
    rows = packed.view(jnp.bfloat16).astype(np.float32)
  elif name == "int8":
    scale = packed[..., d:].view(np.float32)
    rows = packed[..., :d].view(np.int8).astype(np.float32) * scale
  else:
    decode = _unpack_fp8_numpy if xp is np else _unpack_fp8
    rows = decode(packed[..., :d], packed[..., d:])
  return _rounded(rows, dtype)


def _namespace(array: Any) -> Any:
  """NumPy for its arrays, jnp for JAX's, traced ones too."""
  return np if isinstance(array, np.ndarray) else jnp


def _bytes(array):
  """The bytes of each entry, along the last axis."""
  if _namespace(array) is np:
    array = np.ascontiguousarray(array)
  return array.view(np.uint8)


def _rounded(rows, dtype: DTypeLike):
  """float32 rows in `dtype`, to nearest even; subnormal numbers too."""
  if jnp.dtype(dtype) == jnp.float32:
    return rows
  if _namespace(rows) is np:
    return rows.astype(dtype)
  # In integers: the conversion of some processors flushes subnormal numbers.
  bits = rows.view(jnp.uint32)
  half = jnp.uint32(0x7FFF) + ((bits >> 16) & 1)
  is_nan = (bits & 0x7FFFFFFF) > _INF_BITS
  bits = jnp.where(is_nan, bits | 0x400000, bits + half)
  return (bits >> 16).astype(jnp.uint16).view(jnp.bfloat16)


# --- fp8: e4m3fn with a power of two per block ---


def _blocks(rows: Shaped[Array | np.ndarray, "*S d"]):
  """[..., d] as [..., d / 32, 32]."""
  return rows.reshape(*rows.shape[:-1], rows.shape[-1] // BLOCK, BLOCK)


def _fp8_scales(rows: Float[Array | np.ndarray, "*S d"]):
  """uint8 [..., d / 32]: the smallest scales that serve, as `pack_rows` says.

  448 is 1.75 * 2^8: the largest entry's exponent less 8, and one more if its
  fraction is above 1.75. Floats above zero are ordered as their bits are.
  """
  xp = _namespace(rows)
  largest = xp.max(_blocks(rows.view(np.uint32) & 0x7FFFFFFF), axis=-1)
  exponent = (largest >> 23).astype(np.int32)
  above = ((largest & 0x7FFFFF) > 0x600000).astype(np.int32)
  return xp.clip(exponent - 8 + above, 1, 254).astype(np.uint8)


def _pack_fp8(rows, scales):
  xp = _namespace(rows)
  if scales is None:
    scales = _fp8_scales(rows)
  encode = _encode_e4m3_numpy if xp is np else _encode_e4m3
  values = encode(_blocks(rows), scales).reshape(rows.shape)
  return xp.concatenate([values, scales], axis=-1)


def _encode_e4m3_numpy(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
  factors = np.ldexp(np.float32(1), 127 - scales.astype(np.int32))
  with np.errstate(over="ignore"):
    scaled = np.clip(blocks * factors[..., None], -_MAX_E4M3, _MAX_E4M3)
  return scaled.astype(jnp.float8_e4m3fn).view(np.uint8)


def _encode_e4m3(blocks: Array, scales: Array) -> Array:
  """uint8 codes of `blocks / 2^(scales - 127)` in integers, to nearest even."""
  bits = blocks.view(jnp.uint32)
  size = bits & 0x7FFFFFFF
  # A subnormal number is its bits times 2^-149; as a float these are normal.
  is_small = size < 0x800000
  as_float = size.astype(jnp.float32).view(jnp.uint32)
  normal = jnp.where(is_small, as_float, size)
  shift = 127 - scales.astype(jnp.int32)[..., None]
  exponent = (normal >> 23).astype(jnp.int32) + shift
  exponent = exponent - jnp.where(is_small, 149, 0)
  # Below 2^-10 all becomes 0, and above 2^9 all is too large.
  exponent = jnp.clip(exponent, 0, 127 + 9).astype(jnp.uint32)
  scaled = (exponent << 23) | (normal & 0x7FFFFF)
  scaled = jnp.where(exponent == 0, 0, scaled)
  # Exponents from 2^-6 on: round to 3 bits of fraction, move the bias.
  code = (scaled + 0x7FFFF + ((scaled >> 20) & 1)) >> 20
  code = code - ((127 - 7) << 3)
  # Below it: multiples of 2^-9, which is what adding 2^14 rounds to.
  sum_bits = (scaled.view(jnp.float32) + 2.0**14).view(jnp.uint32)
  low = sum_bits - np.float32(2.0**14).view(np.uint32)
  code = jnp.where(exponent < 127 - 6, low, code)
  code = jnp.where(size > _INF_BITS, 0x7F, jnp.minimum(code, 0x7E))
  return (code | (bits >> 24 & 0x80)).astype(jnp.uint8)


def _unpack_fp8_numpy(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
  # 256 products are looked up: half the time of converting every value.
  codes = np.arange(256, dtype=np.uint8)
  numbers = codes.view(jnp.float8_e4m3fn).astype(np.float32)
  factors = codes.view(jnp.float8_e8m0fnu).astype(np.float32)
  for table in (numbers, factors):
    table[np.isnan(table)] = _NAN_BITS.view(np.float32)
  with np.errstate(over="ignore"):
    products = np.take(numbers, _blocks(values))
    products *= np.take(factors, scales)[..., None]
  return products.reshape(values.shape)


def _unpack_fp8(values: Array, scales: Array) -> Array:
  """`values * 2^(scales - 127)` in integers; see the file's docstring."""
  numbers = _blocks(values).view(jnp.float8_e4m3fn).astype(jnp.float32)
  bits = numbers.view(jnp.uint32)
  size = bits & 0x7FFFFFFF
  scale = scales.astype(jnp.int32)[..., None]
  exponent = (size >> 23).astype(jnp.int32) + (scale - 127)
  fraction = size & 0x7FFFFF
  # At most 10 places, and 20 bits of the fraction are zero: nothing is lost.
  places = jnp.clip(1 - exponent, 0, 31).astype(jnp.uint32)
  small = (fraction | 0x800000) >> places
  normal = (jnp.clip(exponent, 0, 254).astype(jnp.uint32) << 23) | fraction
  product = jnp.where(exponent > 0, normal, small)
  product = jnp.where(exponent > 254, _INF_BITS, product)
  product = jnp.where(size == 0, 0, product) | (bits & _SIGN)
  is_nan = (size > _INF_BITS) | (scale == 255)
  product = jnp.where(is_nan, _NAN_BITS, product)
  return product.view(jnp.float32).reshape(values.shape)


# --- int8: a float32 scale per row ---


def _int8_scales(rows: Float[Array | np.ndarray, "*S d"]):
  """float32 [..., 1]: the largest entry over 127, rounded up to 16 bits.

  With so few bits every value times its scale is exact in float32, so that
  packing an unpacked row finds the same scale. It is a product because a
  compiler may make one of the quotient; its factor is at most 1 / 127, so that
  rounding up ends where it began.
  """
  xp = _namespace(rows)
  largest = xp.max(xp.abs(rows), axis=-1, keepdims=True)
  bits = (largest * _PER_127).view(np.uint32)
  scales = ((bits + np.uint32(0xFF)) & np.uint32(0xFFFFFF00)).view(np.float32)
  return xp.clip(scales, _TINY, _MAX_INT8_SCALE)


def _pack_int8(rows):
  xp = _namespace(rows)
  # XLA takes subnormal numbers for 0.
  rows = xp.where(xp.abs(rows) < _TINY, np.float32(0), rows)
  scales = _int8_scales(rows)
  values = xp.clip(xp.rint(rows / scales), -127, 127).astype(np.int8)
  return xp.concatenate([_bytes(values), _bytes(scales)], axis=-1)
