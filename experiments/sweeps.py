"""Several runs that differ in one thing: the same seeds, the same text.

A run that diverges ends by itself: it is told of and recorded, and the others
go on. What a program makes of it the program says.
"""

import contextlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from engram_jax import progress
from engram_jax.analysis.accounting import count_parameters_by_part
from engram_jax.config_dicts import from_dict, to_dict
from engram_jax.data.pipeline import held_out_batches
from engram_jax.errors import NonFiniteError, require
from engram_jax.run_config import ExperimentConfig
from engram_jax.stores.program_stores import TableStore
from engram_jax.training.divergence import DivergedError
from engram_jax.training.evaluation import losses_by_memory
from engram_jax.training.loop import run
from engram_jax.training.metrics import read_metrics
from engram_jax.training.stopping import StoppedError


def changed(
  config: ExperimentConfig, changes: Mapping[str, Any]
) -> ExperimentConfig:
  """The config with fields replaced, by path: `{"train.seed": 1}`.

  Raises:
    InputError: no such field, or a value that does not fit.
  """
  whole = to_dict(config)
  for path, value in changes.items():
    *groups, field = path.split(".")
    group = whole
    for name in groups:
      ok = isinstance(group.get(name), dict)
      require(ok, path, "no such field", "a field of the config, by path")
      group = group[name]
    group[field] = value
  return from_dict(ExperimentConfig, whole)


def train_once(
  config: ExperimentConfig,
  workdir: pathlib.Path,
  *,
  eval_batches: int,
) -> dict[str, Any]:
  """Trains (or finishes) one run and evaluates it on held-out text.

  Args:
    config: config of the run.
    workdir: folder of the run.
    eval_batches: batches of the final evaluation, at most all there are.

  Returns:
    Losses by memory mode, the curve of evaluations, parameters, speed.
  """
  result = run(config, workdir, progress=False)
  if not result.finished:
    step = int(result.state.step)
    raise StoppedError(f"stopped at step {step}; run again to continue")
  model, memory = result.setup.merge_model(result.state), result.setup.memory
  held_out = list(
    held_out_batches(
      result.data,
      "validation",
      seq_len=config.train.seq_len,
      batch_size=config.train.batch_size,
      most=eval_batches,
    )
  )
  tables = result.state.tables
  store = TableStore(tables) if tables else None
  losses = losses_by_memory(result.setup, model, store, lambda: held_out)
  curve = read_metrics(result.folder.metrics, "eval")
  speeds = [
    record["tokens_per_second"]
    for record in read_metrics(result.folder.metrics, "train")
  ]
  return {
    "seed": config.train.seed,
    "loss": losses,
    "curve": [[record["step"], record["loss"]] for record in curve],
    "parameters": count_parameters_by_part(
      config.model, memory and memory.hashing
    ),
    "tokens_per_second": float(np.median(speeds)),
  }


def train_seeds(
  name: str,
  config: ExperimentConfig,
  workdir: pathlib.Path,
  *,
  seeds: Sequence[int],
  eval_batches: int,
  advance: Callable[[int], None],
) -> list[dict[str, Any]]:
  """`train_once` for each seed, telling how it goes.

  Args:
    name: name of the runs, part of the names of their folders.
    config: config of the runs, but for the seed.
    workdir: folder of their folders.
    seeds: seeds of the runs.
    eval_batches: see `train_once`.
    advance: counts the runs; see `runs_of`.

  Returns:
    A record per seed; of a run that diverged its `seed` and, in `diverged`, the
    reason.
  """
  records = []
  for seed in seeds:
    seeded = changed(config, {"train.seed": seed})
    progress.say(f"run {name}, seed {seed}: {config.train.steps:,} steps")
    folder = workdir / f"{name}-seed{seed}"
    try:
      record = train_once(seeded, folder, eval_batches=eval_batches)
      line = f"{record['loss']['on']:.4f}"
    except (DivergedError, NonFiniteError) as error:
      record, line = {"seed": seed, "diverged": str(error)}, str(error)
    advance(1)
    print(f"{name}, seed {seed}: {line}", flush=True)
    records.append(record)
  return records


def finished(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Those of runs that did not diverge."""
  return [record for record in records if "diverged" not in record]


def require_finished(runs: Mapping[str, Sequence[dict[str, Any]]]) -> None:
  """Refuses runs, by name, of which one has diverged.

  Raises:
    DivergedError: with the names and seeds of all that have.
  """
  lost = [
    f"{name}, seed {record['seed']}"
    for name, records in runs.items()
    for record in records
    if "diverged" in record
  ]
  if lost:
    raise DivergedError(f"diverged: {'; '.join(lost)}")


def runs_of(
  config: ExperimentConfig, count: int
) -> contextlib.AbstractContextManager[Callable[[int], None]]:
  """Says what all the runs of a program come to, and counts them.

  Args:
    config: config of one of them; the others are as long.
    count: number of runs.
  """
  train = config.train
  tokens = train.steps * train.batch_size * train.seq_len
  progress.say(f"{count} runs of {train.steps:,} steps, {tokens:,} tokens each")
  return progress.counting("training", total=count, unit="runs")


def spread(values: Sequence[float]) -> str:
  """Mean, and from the least to the most, for a table; of none a dash."""
  if not values:
    return "-"
  mean, low, high = np.mean(values), min(values), max(values)
  return f"{mean:.4f}  ({low:.4f} to {high:.4f}, {len(values)} seeds)"
