"""Row formats on trained models: the error of the rows, and the loss.

  python -m experiments.benchmarks.row_formats --workdir=runs/tiny
  python -m experiments.benchmarks.row_formats --batches=40 \
    --workdir=runs/tiny,runs/tiny-seed1

A model of each run reads its rows from a host store in each format, over the
same held-out batches. To be seen against them: the loss with the memory off,
and with every position reading the rows of another one.

  error       RMS of the rows' errors over that of the rows, each row as often
              as the held-out text reads it
  difference  of the loss to float32's, on the same batches
  +-          its standard error over batches
  of worth    the difference in what the memory is worth: the loss without it
              less the loss with it

To hold: a float32 store gives the loss of the tables themselves. A format that
does not take the width of the run's rows is named and left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from engram_jax.data.pipeline import held_out_batches
from engram_jax.data.prepared import prepare
from engram_jax.errors import InputError, require
from engram_jax.stores.host_stores import HostStore
from engram_jax.stores.open_store import pack_tables
from engram_jax.stores.program_stores import TableStore
from engram_jax.stores.quantization import FORMATS, RowFormat, unpack_rows
from engram_jax.stores.store import RowStore
from engram_jax.training.evaluation import (
  MEMORY_MODES,
  batch_losses,
  batch_row_ids,
)
from engram_jax.training.runs import RunFolder, TrainedModel, load_run
from engram_jax.training.setup import Batch, TrainSetup
from experiments.benchmarks import harness

#: Of the loss, relative: the two programs sum in another order.
TOLERANCE = 1e-6
FLAGS = {
  "workdir": (["runs/tiny"], "Folders of runs."),
  "batches": (40, "Held-out batches."),
}

#: float64 [batches, 2]: sum of losses, and targets.
Losses = np.ndarray


def losses_of(
  trained: TrainedModel,
  store: RowStore,
  batches: Sequence[Batch],
  *,
  memory: str = "on",
) -> Losses:
  found = batch_losses(
    trained.setup,
    trained.model,
    store,
    batches,
    memory=memory,
    prefetch=False,
  )
  return np.array(jax.device_get(list(found)), np.float64)


def mean(losses: Losses) -> float:
  """Nats per token, every target counted once."""
  return float(losses[:, 0].sum() / losses[:, 1].sum())


def paired(losses: Losses, base: Losses) -> tuple[float, float]:
  """The difference of the means, and its standard error over batches.

  Args:
    losses: losses of two batches or more.
    base: losses of the same batches to compare with.
  """
  targets, count = base[:, 1], len(base)
  differences = losses[:, 0] - base[:, 0]
  difference = differences.sum() / targets.sum()
  # A batch with fewer targets weighs less.
  rest = differences - difference * targets
  variance = np.square(rest).sum() * count / (count - 1)
  return float(difference), float(np.sqrt(variance) / targets.sum())


def reads_of(
  setup: TrainSetup, batches: Sequence[Batch]
) -> dict[int, np.ndarray]:
  """int [R] per layer: how often the positions with a target read each row."""
  rows = setup.memory.num_rows
  reads = {layer: np.zeros(count, np.int64) for layer, count in rows.items()}
  for batch in batches:
    for layer, ids in batch_row_ids(setup, batch).items():
      ids = ids[np.asarray(batch["loss_mask"])].reshape(-1)
      reads[layer] += np.bincount(ids, minlength=rows[layer])
  return reads


def error_of(
  tables: Mapping[int, Any],
  packed: Mapping[int, np.ndarray],
  row_format: RowFormat,
  weights: Mapping[int, np.ndarray],
) -> float:
  """RMS of the errors over that of the rows, all layers together.

  Args:
    tables: [R, d] per layer, padding included.
    packed: uint8 [R, n] per layer.
    row_format: format of the packed rows.
    weights: weight of each row, [R] per layer.
  """
  error = square = 0.0
  for layer, table in packed.items():
    rows = np.asarray(tables[layer][: len(table)], np.float64)
    difference = np.asarray(unpack_rows(table, row_format), np.float64) - rows
    error += np.square(difference).sum(axis=1) @ weights[layer]
    square += np.square(rows).sum(axis=1) @ weights[layer]
  return float(np.sqrt(error / square)) if square else 0.0


def compare(trained: TrainedModel, batches: Sequence[Batch]) -> harness.Figures:
  """All formats on one model.

  Args:
    trained: with a memory, on one device.
    batches: two or more.

  Returns:
    `loss` by memory mode, of the tables; `worth`; and `formats`, by name, each
    with its figures or what it was `refused` for.

  Raises:
    InputError: a model without memory, or fewer than two batches.
    RuntimeError: float32's loss is not the tables'.
  """
  require(trained.memory is not None, "workdir", "no memory", "a run with one")
  found, valid = len(batches), "2 or more: an error is over batches"
  require(found >= 2, "batches", found, valid)
  store = TableStore(trained.tables)
  losses = {
    memory: losses_of(trained, store, batches, memory=memory)
    for memory in MEMORY_MODES
  }
  on, reads = mean(losses["on"]), reads_of(trained.setup, batches)
  worth = mean(losses["off"]) - on
  formats, base = {}, None
  for name in FORMATS:
    try:
      packed, fmt = pack_tables(trained.tables, trained.memory.hashing, name)
    except InputError as error:
      formats[name] = {"refused": str(error)}
      continue
    by_store = losses_of(trained, HostStore(packed, fmt), batches)
    base = by_store if base is None else base  # float32 comes first
    difference, deviation = paired(by_store, base)
    formats[name] = {
      "bytes_per_row": fmt.bytes_per_row,
      "error": error_of(trained.tables, packed, fmt, reads),
      "loss": mean(by_store),
      "difference": difference,
      "standard_error": deviation,
      "of_worth": difference / worth,
    }
  if abs(mean(base) / on - 1) > TOLERANCE:
    raise RuntimeError(f"float32 rows: loss {mean(base)}, the tables' {on}")
  return {
    "batches": len(batches),
    "targets": int(base[:, 1].sum()),
    "width": trained.config.model.engram.head_dim,
    "loss": {memory: mean(found) for memory, found in losses.items()},
    "worth": worth,
    "formats": formats,
  }


def of_run(workdir: str, batches: int) -> harness.Figures:
  """`compare` of a run's newest checkpoint on its held-out text."""
  trained, folder = load_run(workdir), RunFolder.of(workdir)
  train, data = trained.config.train, trained.config.data
  held_out = held_out_batches(
    prepare(data, tokenizer_path=folder.tokenizer),
    "validation",
    seq_len=train.seq_len,
    batch_size=train.batch_size,
    most=batches,
  )
  about = {"workdir": workdir, "step": trained.step}
  return about | compare(trained, list(held_out))


def measure(*, workdir: Sequence[str], batches: int) -> harness.Figures:
  """All runs; arguments as the flags."""
  return {"runs": [of_run(path, batches) for path in workdir]}


def tables(result: harness.Figures) -> list[str]:
  columns = {
    "rows": "rows",
    "bytes": "bytes_per_row",
    "error": "error",
    "loss": lambda r: f"{r['loss']:.4f}",
    "difference": lambda r: f"{r['difference']:+.6f}",
    "+-": "standard_error",
    "of worth": "of_worth",
  }
  texts = []
  for run in result["runs"]:
    records = [
      {
        "rows": f"memory {memory}",
        "loss": x,
        "difference": x - run["loss"]["on"],
      }
      for memory, x in run["loss"].items()
    ]
    for name, found in run["formats"].items():
      if "refused" in found:
        texts.append(f"{name} left out: {found['refused']}")
      else:
        records.append({"rows": name, **found})
    title = f"{run['workdir']}, step {run['step']}: {run['targets']:,} targets"
    texts.append(harness.table(columns, records, title=title))
  return texts


BENCHMARK = harness.Benchmark(measure, tables, FLAGS)

if __name__ == "__main__":
  harness.run(BENCHMARK)
