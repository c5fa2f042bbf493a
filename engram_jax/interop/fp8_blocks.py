"""Matrices in fp8 with one scale per block of 32 x 32, as V4.1 stores them.

  x[i, j] = value[i, j] * 2^(scale[i // 32, j // 32] - 127)

Values are e4m3fn, scales e8m0 bytes. The last block of a side may be shorter.
A row of such a matrix is an fp8 row of `quantization.py` whose scales are those
of its blocks; its functions do the arithmetic.

  O  outputs, rows of the matrix     M  inputs, columns
"""

import numpy as np
from jaxtyping import Float32, UInt8

from engram_jax.errors import require
from engram_jax.stores.quantization import (
  BLOCK,
  RowFormat,
  pack_rows,
  unpack_rows,
)


def scale_shape(rows: int, columns: int) -> tuple[int, int]:
  """Shape of the scales of a matrix [rows, columns].

  Args:
    rows: number of rows of the matrix.
    columns: number of its columns, a multiple of 32.
  """
  return -(-rows // BLOCK), columns // BLOCK


def pack_blocks(
  matrix: Float32[np.ndarray, "O M"],
) -> tuple[UInt8[np.ndarray, "O M"], UInt8[np.ndarray, "_I _J"]]:
  """A matrix to values and scales, the smallest scales that serve.

  Raises:
    InputError: entries that are not finite, or M no multiple of 32.
  """
  rows, columns = matrix.shape
  row_format = RowFormat("fp8", columns)
  largest = np.abs(matrix).reshape(rows, -1, BLOCK).max(axis=-1)
  largest = np.maximum.reduceat(largest, np.arange(0, rows, BLOCK))
  # A row of the largest entries asks for the scales that the blocks need.
  packed = pack_rows(np.repeat(largest, BLOCK, axis=1), row_format)
  scales = np.ascontiguousarray(packed[:, columns:])
  by_row = np.repeat(scales, BLOCK, axis=0)[:rows]
  packed = pack_rows(matrix, row_format, scales=by_row)
  return np.ascontiguousarray(packed[:, :columns]), scales


def unpack_blocks(
  values: UInt8[np.ndarray, "O M"], scales: UInt8[np.ndarray, "_I _J"]
) -> Float32[np.ndarray, "O M"]:
  """Values and scales to the matrix, exactly.

  Args:
    values: [O, M], bytes of fp8 numbers (e4m3).
    scales: one byte (e8m0) per block of 32 x 32.

  Raises:
    InputError: scales of another shape, or a product that is not finite.
  """
  rows, columns = values.shape
  expected = scale_shape(rows, columns)
  require(scales.shape == expected, "scales", scales.shape, f"{expected}")
  by_row = np.repeat(scales, BLOCK, axis=0)[:rows]
  packed = np.concatenate([values, by_row], axis=1)
  matrix = unpack_rows(packed, RowFormat("fp8", columns))
  finite = np.isfinite(matrix).all()
  require(finite, "matrix", "NaN or infinity", "finite numbers")
  return matrix
