"""Row formats on trained models: the error of the rows, and the loss.

  python -m experiments.benchmarks.row_formats --workdir=runs/tiny
  python -m experiments.benchmarks.row_formats --batches=40 \
    --workdir=runs/tiny --workdir=runs/tiny-seed1

A model of each run reads its rows from a host store in each format, over the
same held-out batches. To be seen against them: the loss with the memory off,
and with every position reading the rows of another one.

  error       RMS of the rows' errors over that of the rows: of all rows; of
              those that training has moved; and of those that the held-out text
              reads, each as often as it is read
  difference  of the loss to float32's, on the same batches
  +-          its standard error over batches
  of worth    the difference in what the memory is worth: the loss without it
              less the loss with it

To hold: a float32 store gives the loss of the tables themselves. A format that
does not take the width of the run's rows is named and left out.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from engram_jax.data.pipeline import held_out_batches
from engram_jax.data.prepared import prepare
from engram_jax.errors import InputError, require
from engram_jax.memory.homes import pack_tables
from engram_jax.memory.quantization import FORMATS, RowFormat, unpack_rows
from engram_jax.memory.stores import HostStore, RowStore, TableStore
from engram_jax.training.evaluation import (
  MEMORY_MODES,
  batch_losses,
  batch_row_ids,
)
from engram_jax.training.program import Batch, Program
from engram_jax.training.runs import (
  RunFolder,
  TrainedModel,
  initial_state,
  load_run,
)
from experiments.benchmarks import harness

#: Of the loss, relative: the two programs sum in another order.
TOLERANCE = 1e-6
#: A row was moved if an entry is off its start by this part of the tables'
#: standard deviation: more than rounding, less than any step of an optimizer.
MOVED = 1e-4

#: float64 [batches, 2]: sum of losses, and targets.
Losses = np.ndarray


# --- losses ---


def losses_of(
  trained: TrainedModel,
  store: RowStore,
  batches: Sequence[Batch],
  *,
  memory: str = "on",
) -> Losses:
  found = batch_losses(
    trained.program,
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
    losses: of two batches or more.
    base: of the same batches.
  """
  targets, count = base[:, 1], len(base)
  differences = losses[:, 0] - base[:, 0]
  difference = differences.sum() / targets.sum()
  # A batch with fewer targets weighs less.
  rest = differences - difference * targets
  variance = np.square(rest).sum() * count / (count - 1)
  return float(difference), float(np.sqrt(variance) / targets.sum())


# --- rows ---


def moved_rows(trained: TrainedModel) -> dict[int, np.ndarray]:
  """bool [R] per layer: rows that are no longer as the run drew them."""
  drawn = jax.jit(lambda: initial_state(trained.program).tables)()
  least = MOVED * trained.config.model.engram.table_init_std
  return {
    layer: np.asarray(
      jnp.max(jnp.abs(trained.tables[layer] - drawn[layer]), axis=1) > least
    )[:rows]
    for layer, rows in trained.hashing.num_rows.items()
  }


def reads_of(
  program: Program, batches: Sequence[Batch]
) -> dict[int, np.ndarray]:
  """int [R] per layer: how often the positions with a target read each row."""
  rows = program.hashing.num_rows
  reads = {layer: np.zeros(count, np.int64) for layer, count in rows.items()}
  for batch in batches:
    for layer, ids in batch_row_ids(program, batch).items():
      ids = ids[np.asarray(batch["loss_mask"])].reshape(-1)
      reads[layer] += np.bincount(ids, minlength=rows[layer])
  return reads


def errors(
  tables: Mapping[int, Any],
  packed: Mapping[int, np.ndarray],
  row_format: RowFormat,
  weights: Mapping[str, Mapping[int, np.ndarray]],
) -> dict[str, float]:
  """RMS of the errors over that of the rows, all layers together.

  Args:
    tables: [R, d] per layer, padding included.
    packed: uint8 [R, n] per layer.
    row_format: of the packed rows.
    weights: by name, [R] per layer.
  """
  sums = {name: np.zeros(2) for name in weights}
  for layer, table in packed.items():
    rows = np.asarray(tables[layer][: len(table)], np.float32)
    difference = unpack_rows(table, row_format) - rows
    squares = [np.square(x).sum(axis=1) for x in (difference, rows)]
    for name, by_layer in weights.items():
      sums[name] += np.stack(squares).astype(np.float64) @ by_layer[layer]
  return {
    name: float(np.sqrt(error / square)) if square else 0.0
    for name, (error, square) in sums.items()
  }


# --- one run ---


def compare(
  trained: TrainedModel, batches: Sequence[Batch], *, drawn: bool = True
) -> dict[str, Any]:
  """All formats on one model.

  Args:
    trained: with a memory, on one device.
    batches: two or more.
    drawn: whether the tables began as the config draws them; else it is not
      known which rows training has moved.

  Returns:
    `loss` by memory mode, of the tables; `shares` of rows moved and read; and
    `formats`, by name, each with its figures or what it was `refused` for.

  Raises:
    InputError: a model without memory, or fewer than two batches.
  """
  require(trained.hashing is not None, "workdir", "no memory", "a run with one")
  found, valid = len(batches), "2 or more: an error is over batches"
  require(found >= 2, "batches", found, valid)
  program = trained.program
  tables = {
    memory: losses_of(
      trained, TableStore(trained.tables), batches, memory=memory
    )
    for memory in MEMORY_MODES
  }
  reads = reads_of(program, batches)
  weights = {"all": {i: np.ones(len(x)) for i, x in reads.items()}}
  if drawn:
    weights["moved"] = moved_rows(trained)
  weights["read"] = reads
  worth = mean(tables["off"]) - mean(tables["on"])
  formats, base = {}, None
  for name in FORMATS:
    try:
      packed, fmt = pack_tables(trained.tables, trained.hashing, name)
    except InputError as error:
      formats[name] = {"refused": str(error)}
      continue
    losses = losses_of(trained, HostStore(packed, fmt), batches)
    base = losses if base is None else base  # float32 comes first
    difference, deviation = paired(losses, base)
    formats[name] = {
      "bytes_per_row": fmt.bytes_per_row,
      "error": errors(trained.tables, packed, fmt, weights),
      "loss": mean(losses),
      "difference": difference,
      "standard_error": deviation,
      "of_worth": difference / worth,
    }
  off_by = abs(mean(base) / mean(tables["on"]) - 1)
  num_rows = sum(map(len, reads.values()))
  return {
    "batches": len(batches),
    "targets": int(base[:, 1].sum()),
    "width": trained.config.model.engram.head_dim,
    "loss": {memory: mean(losses) for memory, losses in tables.items()},
    "worth": worth,
    "shares": {
      name: sum(int((x > 0).sum()) for x in by_layer.values()) / num_rows
      for name, by_layer in weights.items()
    },
    "formats": formats,
    "float32_off_by": off_by,
    "float32_off_by_at_most": TOLERANCE,
    "float32_is_tables": off_by <= TOLERANCE,
  }


def measure(workdir: str, *, batches: int) -> dict[str, Any]:
  """`compare` of a run's newest checkpoint on its held-out text.

  Args:
    workdir: the run's folder.
    batches: the first so many.
  """
  trained, folder = load_run(workdir), RunFolder.of(workdir)
  data = prepare(trained.config.data, tokenizer_path=folder.tokenizer)
  train = trained.config.train
  held_out = held_out_batches(
    data,
    "validation",
    seq_len=train.seq_len,
    batch_size=train.batch_size,
    most=batches,
  )
  found = compare(trained, list(held_out), drawn=not folder.origin.exists())
  return {"workdir": workdir, "step": trained.step, **found}


# --- all runs ---


def across(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
  """Per format the mean difference over runs, and the least and largest."""
  found = {}
  for name in FORMATS:
    every = [run["formats"][name] for run in runs]
    differences = [x["difference"] for x in every if "difference" in x]
    if differences:
      found[name] = {
        "runs": len(differences),
        "difference": statistics.fmean(differences),
        "least": min(differences),
        "largest": max(differences),
      }
  return found


def table(run: Mapping[str, Any]) -> str:
  """A run's figures for the terminal."""
  parts = list(run["shares"])
  header = ["rows", "bytes", *(f"error, {part}" for part in parts)]
  header += ["loss", "difference", "+-", "of worth"]
  gap = [None] * (1 + len(parts))
  lines = [["tables", *gap, f"{run['loss']['on']:.4f}", None, None, None]]
  refused = []
  for name, found in run["formats"].items():
    if "refused" in found:
      refused.append(f"{name}: left out: {found['refused']}")
      continue
    lines.append(
      [name, found["bytes_per_row"]]
      + [f"{found['error'][part]:.2e}" for part in parts]
      + [f"{found['loss']:.4f}", f"{found['difference']:+.6f}"]
      + [f"{found['standard_error']:.6f}", f"{found['of_worth']:+.2%}"]
    )
  for memory in ("shuffled", "off"):
    loss = run["loss"][memory]
    more = f"{loss - run['loss']['on']:+.6f}"
    lines.append([f"memory {memory}", *gap, f"{loss:.4f}", more, None, None])
  shares = [f"{share:.1%} {part}" for part, share in run["shares"].items()]
  same = "is" if run["float32_is_tables"] else "IS NOT"
  return "\n".join(
    [
      f"{run['workdir']}, step {run['step']}: {run['batches']} batches, "
      f"{run['targets']:,} targets; rows of width {run['width']}, "
      f"{', '.join(shares[1:])}",
      harness.aligned(header, lines),
      *refused,
      f"float32's loss {same} the tables': {run['float32_off_by']:.1e} apart",
    ]
  )


def define_flags() -> None:
  flags.DEFINE_multi_string("workdir", ["runs/tiny"], "A run; repeatable.")
  flags.DEFINE_integer("batches", 40, "Held-out batches.", lower_bound=2)
  out = str(harness.RESULTS / "row_formats.json")
  flags.DEFINE_string("out", out, "Where it goes.")


def main(argv: Sequence[str]) -> None:
  del argv
  args = flags.FLAGS
  runs = [measure(path, batches=args.batches) for path in args.workdir]
  summary, tables = across(runs), [table(run) for run in runs]
  if len(runs) > 1:
    header = ["difference over runs", *summary["float32"]]
    lines = [
      [name, f["runs"]]
      + [f"{f[key]:+.6f}" for key in ("difference", "least", "largest")]
      for name, f in summary.items()
    ]
    tables.append(harness.aligned(header, lines))
  harness.publish({"runs": runs, "across_runs": summary}, tables)


if __name__ == "__main__":
  harness.launch(define_flags, main)
