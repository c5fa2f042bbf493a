"""The balancing bias in a real run: MaxVio by step, and what the bias does.

  python -m experiments.benchmarks.balance \
    --config=experiments/configs/tiny.py --workdir=runs/balance

Four runs per seed, which differ in two fields (`CASES`): with the bias and the
balance loss of the config, with either alone, and with neither. From each
run's own metrics:

  MaxVio    max load / mean load - 1, mean over the blocks with experts and over
            a window of steps
  dropped   share of the assignments that found their expert full

and at its end, on held-out text, the load of every expert with the bias that
was learned and without it, all else equal. That the bias moves load the right
way is that experts with a bias above the mean get more and the others less:
`right_way` is the share of experts of which this is so, and MaxVio must rise
where the bias is taken away.
"""

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from engram_jax.analysis.plots import plot_lines
from engram_jax.backbone.moe import BalancingBias
from engram_jax.backbone.routing import max_violation
from engram_jax.config_dicts import to_dict
from engram_jax.data.prepared import prepare
from engram_jax.errors import require
from engram_jax.run_config import ExperimentConfig
from engram_jax.training.loop import evaluation_batches
from engram_jax.training.metrics import read_metrics
from engram_jax.training.runs import RunFolder, TrainedModel, load_run
from experiments import cli, number_flags
from experiments.benchmarks import harness
from experiments.sweeps import changed, spread, train_once

#: Fields of the experts' config that are 0, by name of the case.
CASES = {
  "bias and loss": (),
  "bias alone": ("balance_loss",),
  "loss alone": ("balance_rate",),
  "neither": ("balance_loss", "balance_rate"),
}


def windows(values: Sequence[float], size: int) -> list[list[float]]:
  """[[last step, mean], ...] of consecutive windows; the last may be shorter.

  Args:
    values: of steps 1, 2, 3, ...
    size: steps of a window.
  """
  require(size >= 1, "window", size, "an integer >= 1")
  found = []
  for start in range(0, len(values), size):
    part = values[start : start + size]
    found.append([start + len(part), float(np.mean(part))])
  return found


def from_metrics(
  records: Sequence[Mapping[str, Any]], config: ExperimentConfig, window: int
) -> dict[str, Any]:
  """MaxVio and dropped share by window, from a run's training records.

  Args:
    records: of `read_metrics`, one of every step.
    config: of the run.
    window: steps.

  Returns:
    `max_violation` and `dropped`, as `windows` gives them; `worst_block`, the
    largest MaxVio of a block in the last window, averaged over its steps.
  """
  model, train = config.model, config.train
  blocks = sum(model.is_moe(layer) for layer in range(model.num_layers))
  by_block = np.array(
    [[r[f"max_violation/{i}"] for i in range(blocks)] for r in records]
  )
  assignments = train.batch_size * train.seq_len * model.moe.top_k * blocks
  dropped = np.array([r["dropped"] for r in records]) / assignments
  last = (len(records) - 1) // window * window
  return {
    "max_violation": windows(by_block.mean(1), window),
    "dropped": windows(dropped, window),
    "worst_block": float(by_block[last:].mean(0).max()),
  }


def loads(
  trained: TrainedModel, batches: Sequence[Mapping[str, Any]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Bias, and load with and without it: each [MoE blocks, E]."""
  program = trained.program
  graph, params, balance = nnx.split(trained.model, nnx.Param, BalancingBias)

  @functools.partial(jax.jit, static_argnums=0)
  def of(graph, params, balance, tables, batch):
    read = program.read(tables, program.row_ids(batch))
    model = nnx.merge(graph, params, balance)
    out = model(
      batch["inputs"], read.rows, breaks=batch["breaks"], logits=False
    )
    return out.moe.load

  without = jax.tree.map(jnp.zeros_like, balance)
  total = [
    sum(
      np.asarray(of(graph, params, b, trained.tables, dict(batch)))
      for batch in batches
    )
    for b in (balance, without)
  ]
  (bias,) = jax.tree.leaves(balance)
  return np.asarray(bias), *total


def effect(
  bias: np.ndarray, load: np.ndarray, without: np.ndarray
) -> dict[str, Any]:
  """What the bias does to the load.

  Args:
    bias: [MoE blocks, E].
    load: assignments with it, [MoE blocks, E].
    without: assignments without it.

  Returns:
    `max_violation` and `max_violation_without`, means over blocks; `right_way`,
    of the experts whose bias is off its block's mean and whose load changes,
    the share that has more load if above, and less if below; `correlation` of
    their bias and change of load. The last two are None where there are none.
  """
  above = bias - bias.mean(axis=1, keepdims=True)
  change = load - without
  moved = (np.abs(above) > 1e-6) & (change != 0)
  above, change = above[moved], change[moved]
  right = correlation = None
  if above.size:
    right = float(np.mean(np.sign(above) == np.sign(change)))
    if np.ptp(above) > 0 and np.ptp(change) > 0:
      correlation = float(np.corrcoef(above, change)[0, 1])

  def violation(load):
    return float(jnp.mean(max_violation(jnp.asarray(load, jnp.float32))))

  return {
    "max_violation": violation(load),
    "max_violation_without": violation(without),
    "right_way": right,
    "correlation": correlation,
  }


def measure(
  config: ExperimentConfig,
  workdir: pathlib.Path,
  *,
  window: int,
  eval_batches: int,
) -> dict[str, Any]:
  """Trains (or finishes) one run, and reads off how balanced it was.

  Args:
    config: of the run; every step is logged.
    workdir: of the run.
    window: steps that are averaged.
    eval_batches: of the final loss.

  Returns:
    `seed`, `loss` on held-out text, what `from_metrics` gives, and `bias`,
    what `effect` gives.
  """
  record = train_once(config, workdir, eval_batches=eval_batches)
  steps = read_metrics(RunFolder.of(workdir).metrics, "train")
  trained = load_run(workdir)
  batches = list(evaluation_batches(config, prepare(config.data)))
  return {
    "seed": record["seed"],
    "loss": record["loss"]["on"],
    **from_metrics(steps, config, window),
    "bias": effect(*loads(trained, batches)),
  }


def report(cases: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
  """The cases as a table: means over seeds, the loss with its spread."""

  def mean(records, read):
    values = [read(r) for r in records]
    return None if None in values else float(np.mean(values))

  header = ["", "MaxVio, first", "last", "worst block", "dropped", "right way"]
  header += ["MaxVio held out", "without bias", "validation loss"]
  rows = [
    (
      name,
      mean(records, lambda r: r["max_violation"][0][1]),
      mean(records, lambda r: r["max_violation"][-1][1]),
      mean(records, lambda r: r["worst_block"]),
      mean(records, lambda r: r["dropped"][-1][1]),
      mean(records, lambda r: r["bias"]["right_way"]),
      mean(records, lambda r: r["bias"]["max_violation"]),
      mean(records, lambda r: r["bias"]["max_violation_without"]),
      spread([r["loss"] for r in records]),
    )
    for name, records in cases.items()
  ]
  return harness.aligned(header, rows)


def define_flags() -> None:
  out = str(harness.RESULTS / "balance.json")
  cli.define_config()
  flags.DEFINE_string("out", out, "JSON; .png beside it.")
  flags.DEFINE_string("workdir", None, "Folder of all the runs.")
  number_flags.define("seeds", [0, 1, 2], "Of the runs.")
  flags.DEFINE_list("cases", list(CASES), f"Of {', '.join(CASES)}.")
  flags.DEFINE_integer("window", 20, "Steps that are averaged.", lower_bound=1)
  flags.DEFINE_integer("eval_batches", 40, "Of the final evaluation.")
  flags.mark_flags_as_required(["config", "workdir"])


def main(argv: Sequence[str]) -> None:
  del argv
  args = flags.FLAGS
  valid = f"of {', '.join(CASES)}"
  for name in args.cases:
    require(name in CASES, "cases", name, valid)
  config = changed(cli.frozen(args.config), {"train.log_every": 1})
  require(config.model.moe is not None, "model.moe", None, "experts")
  workdir = pathlib.Path(args.workdir).expanduser()
  seeds = args.seeds
  cases: dict[str, list] = {name: [] for name in args.cases}
  for seed in seeds:
    for name, records in cases.items():
      changes = {f"model.moe.{field}": 0.0 for field in CASES[name]}
      record = measure(
        changed(config, {**changes, "train.seed": seed}),
        workdir / f"{name.replace(' ', '-')}-seed{seed}",
        window=args.window,
        eval_batches=args.eval_batches,
      )
      last = record["max_violation"][-1][1]
      print(f"{name}, seed {seed}: MaxVio {last:.2f} at the end", flush=True)
      records.append(record)
  moe = config.model.moe
  result = {
    "config": to_dict(config),
    "balance_rate": moe.balance_rate,
    "balance_loss": moe.balance_loss,
    "window": args.window,
    "seeds": seeds,
    "cases": cases,
  }
  plot_lines(
    {
      name: (
        [step for step, _ in records[0]["max_violation"]],
        np.array([[v for _, v in r["max_violation"]] for r in records]).T,
      )
      for name, records in cases.items()
    },
    pathlib.Path(args.out).with_suffix(".png"),
    title="The balancing bias and the balance loss",
    xlabel="step",
    ylabel=f"MaxVio, mean over blocks and {args.window} steps",
  )
  title = (
    f"bias by {moe.balance_rate:g} a step, loss times {moe.balance_loss:g}"
  )
  harness.publish(result, [title, report(cases)])


if __name__ == "__main__":
  harness.launch(define_flags, main)
