"""Writes the tables of a trained checkpoint to a row file, quantised.

  python -m experiments.pack_memory --workdir=runs/tiny --format=int8 \
    --output=runs/tiny/memory.rows

The file holds the model's hash constants, the digest of its token compression
and which checkpoint its rows are from, so that it is refused by any other
model, any other run, and any other step of the same run. The rows lose what the
format loses; the program says how much. fp8 has a scale for 32 columns, and
wants rows of a multiple of 32.
"""

import os
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from engram_jax import progress
from engram_jax.errors import require
from engram_jax.stores.quantization import (
  FORMATS,
  RowFormat,
  pack_rows,
  unpack_rows,
)
from engram_jax.stores.row_file_headers import Header
from engram_jax.stores.row_files import RowFile, write_row_file
from engram_jax.training.runs import TrainedModel, load_run
from experiments import cli
from experiments.results import require_place

_FLAGS = cli.flag_values(__name__)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run.", flag_values=_FLAGS
)
_STEP = flags.DEFINE_integer(
  "step", None, "Checkpoint; the newest if not set.", flag_values=_FLAGS
)
_FORMAT = flags.DEFINE_enum(
  "format", "fp8", FORMATS, "Of the packed rows.", flag_values=_FLAGS
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "The file to write.", flag_values=_FLAGS
)
flags.mark_flags_as_required(["workdir", "output"], flag_values=_FLAGS)

#: Rows that are packed at a time.
CHUNK = 2**16


@jax.jit(static_argnums=1)
def _pack(rows: jax.Array, row_format: RowFormat):
  """Packed rows, and the sums of squares of the rows and of their errors."""
  packed = pack_rows(rows, row_format)
  rows = rows.astype(jnp.float32)
  error = unpack_rows(packed, row_format) - rows
  sums = jnp.stack([jnp.sum(jnp.square(x)) for x in (rows, error)])
  return packed, sums


def pack_memory(
  trained: TrainedModel, path: str | os.PathLike[str], name: str
) -> dict[int, float]:
  """Writes the file.

  Args:
    trained: with a memory.
    path: path of the file; written whole or not at all.
    name: the format's.

  Returns:
    Per layer, the RMS of the error over that of the rows.

  Raises:
    InputError: a model without memory, rows that are not finite, a width that
      the format does not take, or a folder that cannot be written to.
  """
  require(trained.tables, "workdir", "no memory", "a run of a model with one")
  memory = trained.memory
  row_format = RowFormat(name, memory.config.head_dim)
  header = Header(
    row_format,
    memory.num_rows,
    memory.hashing,
    memory.compression.digest,
    trained.identity,
  )
  sums = {layer: np.zeros(2) for layer in memory.layers}

  def chunks(layer: int) -> Iterator[np.ndarray]:
    rows = memory.num_rows[layer]  # the rest is padding
    for start in range(0, rows, CHUNK):
      end = min(start + CHUNK, rows)
      packed, squares = _pack(trained.tables[layer][start:end], row_format)
      # One entry that is not finite makes the sums so.
      found = f"NaN, infinity or too large, rows {start} to {end - 1}"
      field = f"tables[{layer}]"
      require(np.isfinite(squares).all(), field, found, "finite numbers")
      sums[layer] += squares
      yield np.asarray(packed)
      shown(end - start)

  total, size = sum(memory.num_rows.values()), progress.size(header.file_bytes)
  progress.say(f"packing {total:,} rows as {name}, {size}, into {path}")
  with progress.counting("packing", total=total, unit="rows") as shown:
    write_row_file(path, {layer: chunks(layer) for layer in sums}, header)
  return {
    layer: float(np.sqrt(error / square)) if square else 0.0
    for layer, (square, error) in sums.items()
  }


def main(argv) -> None:
  del argv
  output = require_place(_OUTPUT.value, "output")
  with progress.waiting("reading the checkpoint", announce=False):
    trained = load_run(_WORKDIR.value, step=_STEP.value)
  errors = pack_memory(trained, output, _FORMAT.value)
  file = RowFile(output)
  with progress.waiting("comparing checksums", announce=False):
    file.verify()
  header = file.header
  size = header.row_format.bytes_per_row
  lines = [
    ("format", f"{_FORMAT.value}, {size} bytes a row"),
    ("size", f"{header.file_bytes} bytes"),
  ]
  for layer, error in errors.items():
    rows = header.num_rows[layer]
    lines.append((f"layer {layer}", f"{rows} rows, relative error {error:.3g}"))
  print(cli.table(lines, f"{_OUTPUT.value}: step {trained.step}"))


if __name__ == "__main__":
  cli.run(main)
