"""The memory against more experts, at equal parameters and equal work.

  python -m experiments.compare --config=experiments/configs/tiny.py \
    --workdir=runs/compare

Two models: the config's, and the same one whose memory has been turned into
routed experts (equal total and equal activated parameters, see
`analysis.allocation.swap_memory_for_experts`). Equal text in equal order. The
learning rate is tuned on the side *without* memory, on a seed of its own, and
used for both: what the memory wins, it wins at its rival's best rate. A rate at
which the rival diverges is told of and left out of the choice. If a run of the
comparison itself diverges, the others are finished and the program ends with
its name: to leave its seed out would favour its side.
"""

import pathlib

import numpy as np
from absl import flags

from engram_jax.analysis.allocation import swap_memory_for_experts
from engram_jax.analysis.plots import plot_lines
from engram_jax.config_dicts import to_dict
from engram_jax.data.prepared import prepare
from engram_jax.errors import require
from engram_jax.run_config import ExperimentConfig
from engram_jax.training.runs import make_memory
from experiments import cli, number_flags
from experiments.results import ROOT, require_place, write_result
from experiments.sweeps import (
  changed,
  finished,
  require_finished,
  runs_of,
  spread,
  train_seeds,
)

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of all the runs.")
_SEEDS = number_flags.define("seeds", [0, 1, 2], "Of the comparison.")
_RATES = number_flags.define(
  "learning_rates",
  [1e-3, 2e-3, 4e-3, 8e-3],
  "Tried without memory.",
  kind=float,
)
_TUNING_SEED = flags.DEFINE_integer("tuning_seed", 100, "Of the tuning runs.")
_BATCHES = flags.DEFINE_integer("eval_batches", 40, "Of the final evaluation.")
_OUT = flags.DEFINE_string(
  "out", str(ROOT / "experiments/results/compare.json"), "JSON; .png beside it."
)
flags.mark_flags_as_required(["config", "workdir"])


def without_memory(config: ExperimentConfig) -> ExperimentConfig:
  """The same run of the model whose memory has become experts."""
  require(config.model.engram, "model.engram", None, "a memory to compare")
  memory = make_memory(config, prepare(config.data).tokenizer)
  model = swap_memory_for_experts(
    config.model, memory.hashing, equal_activated=True
  )
  return changed(config, {"model": to_dict(model)})


def tune(
  config, workdir, *, rates, seed, **options
) -> dict[float, float | None]:
  """Loss at the end of a run, by learning rate; None where it diverged.

  Raises:
    DivergedError: at every rate.
  """
  losses, runs = {}, {}
  for rate in rates:
    at_rate = changed(config, {"train.learning_rate": rate})
    name = f"tuning-{rate:g}"
    runs[name] = train_seeds(name, at_rate, workdir, seeds=[seed], **options)
    (record,) = runs[name]
    losses[rate] = None if "diverged" in record else record["loss"]["on"]
  if not any(finished(records) for records in runs.values()):
    require_finished(runs)
  return losses


def train_both(config, rival, workdir, *, rates, seeds, **options):
  """Losses by rate, the best rate, and the records of both sides at it."""
  tuning = tune(rival, workdir, rates=rates, seed=_TUNING_SEED.value, **options)
  tried = [rate for rate in rates if tuning[rate] is not None]
  best = min(tried, key=tuning.get)
  if best in (rates[0], rates[-1]) and len(rates) > 1:
    print(f"the best rate, {best:g}, is at the edge of those tried: {rates}")
  sides = {}
  for name, side in (("memory", config), ("experts", rival)):
    at_best = changed(side, {"train.learning_rate": best})
    sides[name] = train_seeds(name, at_best, workdir, seeds=seeds, **options)
  require_finished(sides)
  return tuning, best, sides


def report(result: dict) -> str:
  """The comparison as a table for the terminal."""
  memory, experts = result["memory"], result["experts"]
  rows = [
    ("with memory", spread([r["loss"]["on"] for r in memory])),
    ("experts instead", spread([r["loss"]["on"] for r in experts])),
    ("  difference", spread(result["difference"])),
    ("memory turned off", spread([r["loss"]["off"] for r in memory])),
    ("wrong rows", spread([r["loss"]["shuffled"] for r in memory])),
  ]
  for name in ("total", "activated"):
    sizes = [side[0]["parameters"][name] for side in (memory, experts)]
    rows.append((f"{name} parameters", "{:,} and {:,}".format(*sizes)))
  speeds = [
    np.median([r["tokens_per_second"] for r in side])
    for side in (memory, experts)
  ]
  rows.append(("tokens/s, ratio", f"{speeds[0] / speeds[1]:.2f}"))
  rows.append(("learning rate", f"{result['learning_rate']:g}"))
  return cli.table(rows, "Validation loss, nats per token")


def main(argv) -> None:
  del argv
  require_place(_OUT.value)
  workdir = pathlib.Path(_WORKDIR.value).expanduser()
  config = cli.frozen(_CONFIG.value)
  rival = without_memory(config)
  rates, seeds = _RATES.value, _SEEDS.value
  with runs_of(config, len(rates) + 2 * len(seeds)) as advance:
    options = dict(eval_batches=_BATCHES.value, advance=advance)
    tuning, best, sides = train_both(
      config, rival, workdir, rates=rates, seeds=seeds, **options
    )
  pairs = zip(sides["memory"], sides["experts"])
  result = {
    "config": to_dict(config),
    "config_experts": to_dict(rival),
    "tuning": {f"{rate:g}": loss for rate, loss in tuning.items()},
    "learning_rate": best,
    **sides,
    "difference": [m["loss"]["on"] - e["loss"]["on"] for m, e in pairs],
  }
  write_result(_OUT.value, result)
  names = {"memory": "with memory", "experts": "experts instead"}
  plot_lines(
    {
      names[name]: (
        [step for step, _ in records[0]["curve"]],
        np.array([[loss for _, loss in r["curve"]] for r in records]).T,
      )
      for name, records in sides.items()
    },
    pathlib.Path(_OUT.value).with_suffix(".png"),
    title="A memory or more experts: equal parameters, equal text",
    xlabel="step",
    ylabel="validation loss (nats per token)",
  )
  print(report(result))


if __name__ == "__main__":
  cli.run(main)
