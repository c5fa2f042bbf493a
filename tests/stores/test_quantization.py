"""Packed rows: every byte, both forms bit for bit, what comes back."""

import fractions

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from engram_jax.errors import InputError
from engram_jax.stores.quantization import (
  FORMATS,
  RowFormat,
  pack_rows,
  unpack_rows,
)

FP8 = RowFormat("fp8", 32)


def bits(x):
  x = np.asarray(x)
  return x.view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


def all_pairs(other=0):
  """uint8 [256 values, 256 scales, 33]: a block of each, and `other`."""
  packed = np.full((256, 256, 33), other, np.uint8)
  packed[..., 0] = np.arange(256)[:, None]
  packed[..., 32] = np.arange(256)
  return packed


def fp8_exact(value: int, scale: int) -> fractions.Fraction:
  """The number as OCP's tables define it, without ml_dtypes; finite only."""
  exponent, fraction = value >> 3 & 15, value & 7
  if exponent:
    number = (1 + fractions.Fraction(fraction, 8)) * fractions.Fraction(2) ** (
      exponent - 7
    )
  else:
    number = fractions.Fraction(fraction, 8) * fractions.Fraction(2) ** -6
  sign = -1 if value & 0x80 else 1
  return sign * number * fractions.Fraction(2) ** (scale - 127)


def rows_of(kind, shape=(500, 64)):
  random = np.random.default_rng(0)
  rows = random.normal(size=shape).astype(np.float32)
  if kind == "ties":
    return np.round(rows * 64) / 64
  words = random.integers(0, 2**32, shape, dtype=np.uint32)
  if kind == "any":
    rows = words.view(np.float32)
    return np.where(abs(rows) < 3e38, rows, 1).astype(np.float32)
  if kind == "small":  # subnormal numbers and their neighbours
    exponents = random.integers(0, 30, (shape[0], 1), dtype=np.uint32)
    return (words & 0x807FFFFF | exponents << 23).view(np.float32)
  return rows


def test_fp8_of_every_value_and_scale_is_the_exact_number():
  found = unpack_rows(all_pairs(), FP8)[..., 0]
  assert np.isnan(found[[0x7F, 0xFF]]).all() and np.isnan(found[:, 255]).all()
  limit = fractions.Fraction(2) ** 128
  for value in range(256):
    for scale in range(0, 255, 1 if value % 37 == 1 else 13):
      if value & 0x7F == 0x7F:
        continue
      exact, number = fp8_exact(value, scale), found[value, scale]
      if abs(exact) >= limit:
        assert number == np.inf * (1 if exact > 0 else -1)
      else:
        assert fractions.Fraction(float(number)) == exact
      assert np.signbit(number) == (value >= 0x80)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_fp8_of_every_value_and_scale_has_the_same_bits_on_the_device(dtype):
  packed = all_pairs(other=0x7E)
  host = unpack_rows(packed, FP8, dtype)
  device = jax.jit(lambda x: unpack_rows(x, FP8, dtype))(packed)
  assert host.dtype == device.dtype == dtype
  np.testing.assert_array_equal(bits(host), bits(device))


def test_fp8_against_another_implementation_of_the_formats():
  packed = all_pairs()[:, 1:]
  values = packed[..., :32].view(ml_dtypes.float8_e4m3fn).astype(np.float64)
  scales = packed[..., 32:].view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
  with np.errstate(over="ignore"):
    expected = (values * scales).astype(np.float32)
  np.testing.assert_array_equal(unpack_rows(packed, FP8), expected)
  # The byte shifted into a float32's exponent is the scale; byte 0 is not.
  shifted = (packed[0, :, 32].astype(np.uint32) << 23).view(np.float32)
  np.testing.assert_array_equal(shifted[:254], scales[0, :254, 0])
  assert unpack_rows(all_pairs()[:, 0], FP8)[0x38, 0] == 2.0**-127


@pytest.mark.parametrize("through", [jnp.float32, jnp.bfloat16])
def test_fp8_bytes_come_back_with_their_own_scales(through):
  packed = all_pairs()
  rows = unpack_rows(packed, FP8, through).astype(np.float32)
  finite = np.isfinite(rows).all(-1)
  # All that is finite; through bfloat16, all of which it has the bits.
  assert finite[:0x7F, :247].all()
  if through == jnp.bfloat16:
    finite[:, :3] = False
  scales = packed[..., 32:]
  host = pack_rows(rows[finite], FP8, scales=scales[finite])
  np.testing.assert_array_equal(host, packed[finite])
  device = jax.jit(lambda x, s: pack_rows(x, FP8, scales=s))
  found = device(rows[finite], scales[finite])
  np.testing.assert_array_equal(found, packed[finite])


def test_fp8_packed_again_keeps_every_number_and_its_own_bytes():
  packed = all_pairs()
  packed[..., 1] = 0x05  # something that must survive beside the largest
  rows = unpack_rows(packed, FP8)
  finite = np.isfinite(rows).all(-1)
  finite[:, 0] = False  # 2^-127: below the scales that are chosen
  again = pack_rows(rows[finite], FP8)
  np.testing.assert_array_equal(
    bits(unpack_rows(again, FP8)), bits(rows[finite])
  )
  at_zero = pack_rows(rows[:0x7F, 0], FP8)
  lost = (unpack_rows(at_zero, FP8) != rows[:0x7F, 0]).any(-1)
  odd = (rows[:0x7F, 0].astype(np.float64) * 2.0**136 % 2 == 1).any(-1)
  np.testing.assert_array_equal(lost, odd)
  # Bytes too, wherever the scale was the one to choose: 224 < |value| <= 448.
  value, scale = packed[finite][:, 0] & 0x7F, packed[finite][:, 32]
  own = (value > 0x76) | (scale == 1)
  assert own.sum() > 3000
  np.testing.assert_array_equal(again[own], packed[finite][own])
  assert (again[~own] != packed[finite][~own]).any(-1).all()


def test_fp8_scale_is_the_smallest_that_serves():
  rows = rows_of("normal")
  scales = pack_rows(rows, RowFormat("fp8", 64))[:, 64:].astype(int)
  largest = abs(rows.reshape(-1, 2, 32)).max(-1)
  assert (largest <= 448 * 2.0 ** (scales - 127)).all()
  assert (largest > 448 * 2.0 ** (scales - 128)).all()
  edge = np.zeros((3, 32), np.float32)
  edge[:2, 7] = [448, np.nextafter(np.float32(448), np.float32(449))]
  # Not byte 0 for zeros: engines that shift the byte read it as 0.
  assert pack_rows(edge, FP8)[:, 32].tolist() == [127, 128, 1]


def test_a_released_row_has_264_bytes_values_first():
  row_format = RowFormat("fp8", 256)
  assert row_format.bytes_per_row == 264
  values = np.tile(np.arange(8, dtype=np.uint8)[:, None] + 0x38, 32)
  scales = np.arange(120, 128, dtype=np.uint8)
  row = np.concatenate([values.reshape(-1), scales])
  numbers = unpack_rows(row, row_format).reshape(8, 32)
  expected = (1 + np.arange(8) / 8) * 2.0 ** np.arange(-7, 1)
  np.testing.assert_array_equal(numbers, np.tile(expected[:, None], 32))


@pytest.mark.parametrize("kind", ["normal", "ties", "any", "small"])
@pytest.mark.parametrize("name", FORMATS)
def test_both_forms_give_the_same_bits(name, kind):
  row_format, rows = RowFormat(name, 64), rows_of(kind)
  packed = pack_rows(rows, row_format)
  assert packed.dtype == np.uint8 and type(packed) is np.ndarray
  assert packed.shape == (500, row_format.bytes_per_row)
  device = jax.jit(lambda x: pack_rows(x, row_format))(rows)
  np.testing.assert_array_equal(packed, device)
  for dtype in (jnp.float32, jnp.bfloat16):
    host = unpack_rows(packed, row_format, dtype)
    device = jax.jit(lambda x, t=dtype: unpack_rows(x, row_format, t))(packed)
    assert host.dtype == device.dtype == dtype
    np.testing.assert_array_equal(bits(host), bits(device))


def test_errors_are_those_of_the_formats():
  rows = rows_of("normal")

  def unpacked(name):
    row_format = RowFormat(name, 64)
    return unpack_rows(pack_rows(rows, row_format), row_format)

  np.testing.assert_array_equal(unpacked("float32"), rows)
  halves = rows.astype(ml_dtypes.bfloat16)
  np.testing.assert_array_equal(unpacked("bfloat16"), halves)
  # Half a step of the largest; one in 16 of a number above the smallest ones.
  steps = abs(rows).max(1, keepdims=True) / 127
  assert (abs(unpacked("int8") - rows) <= 0.501 * steps).all()
  large = abs(rows) > 1e-2
  assert (abs(unpacked("fp8") - rows) <= abs(rows) / 16)[large].all()


@pytest.mark.parametrize("kind", ["normal", "any", "small"])
def test_int8_bytes_come_back(kind):
  rows, row_format = rows_of(kind, (5000, 16)), RowFormat("int8", 16)
  packed = pack_rows(rows, row_format)
  numbers = unpack_rows(packed, row_format)
  np.testing.assert_array_equal(pack_rows(numbers, row_format), packed)
  assert np.isfinite(numbers).all()
  largest = np.float32(np.finfo(np.float32).max)
  end = pack_rows(np.full((1, 16), -largest), row_format)
  np.testing.assert_allclose(unpack_rows(end, row_format), -largest, rtol=1e-4)
  assert (pack_rows(np.zeros((1, 16)), row_format)[:, :16] == 0).all()
  # What makes the scale come back: its factor is not above 1 / 127.
  assert fractions.Fraction(float(np.float32(1 / 127))) <= fractions.Fraction(
    1, 127
  )


def test_formats_and_inputs_are_refused_by_name():
  rows = np.zeros((2, 64), np.float32)
  fp8 = RowFormat("fp8", 64)
  with pytest.raises(InputError, match=r"format: fp4; valid: float32 or"):
    RowFormat("fp4", 64)
  with pytest.raises(InputError, match=r"width: 48; valid: .* multiple of 32"):
    RowFormat("fp8", 48)
  with pytest.raises(InputError, match="width: 0"):
    RowFormat("int8", 0)
  with pytest.raises(InputError, match=r"rows\.shape: .*width 32"):
    pack_rows(rows, FP8)
  for wrong in (np.nan, np.inf):
    with pytest.raises(InputError, match=f"rows: {wrong}; valid: finite"):
      pack_rows(np.full((2, 64), wrong), fp8)
  with pytest.raises(InputError, match="rows: inf; valid: finite"):
    pack_rows(np.full((2, 64), 1e39), fp8)
  with pytest.raises(InputError, match="scales: given for int8"):
    pack_rows(rows, RowFormat("int8", 64), scales=np.ones((2, 2), np.uint8))
  with pytest.raises(InputError, match=r"scales: .*valid: uint8\[2, 2\]"):
    pack_rows(rows, fp8, scales=np.ones((2, 1), np.uint8))
  with pytest.raises(InputError, match=r"packed: .*valid: uint8, 66"):
    unpack_rows(np.zeros((2, 64), np.uint8), fp8)
  with pytest.raises(InputError, match="dtype: float16; valid: float32 or"):
    unpack_rows(np.zeros((2, 66), np.uint8), fp8, jnp.float16)
