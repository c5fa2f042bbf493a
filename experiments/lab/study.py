"""What all studies share: flags, the tuned rate, the result and its picture.

  python -m experiments.lab.memory_scaling --scale=cpu

Finished runs are kept in --folder and not repeated: a study that was stopped
goes on, and the same command in a second terminal shares its runs. What is
finished can be looked at on the way with --report_only.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from absl import flags

from engram_jax.config_dicts import to_dict
from engram_jax.errors import require
from experiments import cli
from experiments.lab.runs import Laboratory, Run, Trained, by_group
from experiments.lab.scales import SCALES, Scale, scale_of
from experiments.results import ROOT, require_place, write_result

RESULTS = ROOT / "experiments/results/lab"

#: What a reader may quote of a study.
VERDICTS = ("reproduced", "not seen", "contradicted", "too weak to tell")

#: Seed of the runs that the learning rate is tuned with.
TUNING_SEED = 100


@dataclasses.dataclass(frozen=True)
class Study:
  """A study: which runs, what is measured, what follows.

  Attributes:
    name: name of its module, its records and its result.
    runs: the runs, in the order in which they are to be made.
    measure: what to find out of a trained run, as JSON values.
    analyze: the result of the records: figures with their intervals, and
      `verdict` (one of `VERDICTS`) with `finding`, a sentence. Records may be
      missing, of runs that are not finished or have diverged.
    draw: the picture of a result.
    keep: leave checkpoints for other studies.
  """

  name: str
  runs: Callable[[Laboratory], list[Run]]
  measure: Callable[[Laboratory, Trained], dict[str, Any]]
  analyze: Callable[[Laboratory, list[dict[str, Any]]], dict[str, Any]]
  draw: Callable[[dict[str, Any], pathlib.Path], None]
  keep: bool = False

  def make(
    self, lab: Laboratory, out: pathlib.Path, *, report_only: bool = False
  ) -> dict[str, Any]:
    """Makes the runs, and writes the result and its picture.

    Args:
      lab: where the runs are made.
      out: the .json file; the picture is beside it.
      report_only: make no run: the result of what is finished.

    Returns:
      The result.
    """
    require_place(out)
    runs = self.runs(lab)
    if report_only:
      records = lab.records(runs, name=self.name)
      require(records, "report_only", "no finished run", "one or more")
    else:
      records = lab.measure_all(
        runs,
        lambda trained: self.measure(lab, trained),
        name=self.name,
        keep=self.keep,
      )
    found = self.analyze(lab, records)
    verdict, valid = found.get("verdict"), f"one of {', '.join(VERDICTS)}"
    require(verdict in VERDICTS, "verdict", verdict, valid)
    name, scale = self.name, lab.scale.name
    result = {
      # Without the place of the runs, which is this machine's affair.
      "command": f"python -m experiments.lab.{name} --scale={scale}",
      "study": name,
      "scale": scale,
      "runs": {
        "all": len(runs),
        "finished": len(records),
        "diverged": [
          f"{r['group']}, seed {r['seed']}" for r in records if "diverged" in r
        ],
        "hours": sum(r.get("seconds", 0) for r in records) / 3600,
        "commits": sorted({r["commit"] for r in records if "commit" in r}),
      },
      "corpora": {
        name: {"name": c.name, "files": c.files, "bytes": c.bytes}
        for name, c in ((n, lab.corpus(n)) for n in ("code", "prose"))
      },
      **found,
      "model": to_dict(lab.scale.model),
      "layout": to_dict(lab.scale.layout),
      "records": records,
    }
    write_result(out, result)
    self.draw(result, out.with_suffix(".png"))
    print(f"{self.name}, {lab.scale.name}: {verdict}. {found['finding']}")
    print(f"{len(records)} of {len(runs)} runs; {out}")
    return result

  def main(self) -> None:
    """The program of the study."""
    scale = flags.DEFINE_enum("scale", "smoke", [*SCALES], "Size of the runs.")
    folder = flags.DEFINE_string(
      "folder", None, "Corpora, runs and records; runs/lab/SCALE by default."
    )
    out = flags.DEFINE_string(
      "out",
      None,
      "JSON; .png beside it. By default of cpu and gpu scale "
      "experiments/results/lab/, else the folder.",
    )
    report = flags.DEFINE_bool(
      "report_only", False, "Make no run: the result of what is finished."
    )

    def main(argv) -> None:
      del argv
      lab = open_laboratory(scale.value, folder.value)
      place = out.value or default_out(self.name, lab)
      self.make(lab, pathlib.Path(place).expanduser(), report_only=report.value)

    cli.run(main)


def open_laboratory(scale: str, folder: str | None = None) -> Laboratory:
  """The laboratory of a scale, in its own folder or the default one.

  Sets JAX's compilation cache for this process: runs that differ in their seed
  alone are compiled once.
  """
  place = pathlib.Path(folder or ROOT / "runs/lab" / scale)
  place = place.expanduser().absolute()
  jax.config.update("jax_compilation_cache_dir", str(place / "jax_cache"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  if scale == "smoke":  # nearly all of its time is compilation
    jax.config.update("jax_disable_most_optimizations", True)
  return Laboratory(scale_of(scale), place)


def default_out(study: str, lab: Laboratory) -> pathlib.Path:
  """Where the result of a study belongs; that of a test, beside its runs."""
  name = study if lab.scale.name == "cpu" else f"{study}_{lab.scale.name}"
  place = lab.folder if lab.scale.name == "smoke" else RESULTS
  return place / f"{name}.json"


def measure_losses(lab: Laboratory, trained: Trained) -> dict[str, Any]:
  """`Laboratory.losses`, which most studies measure and nothing else."""
  return {"loss": lab.losses(trained)}


def tuned_learning_rate(lab: Laboratory) -> float:
  """The best rate of the model *without* a memory, at the middle length.

  What a memory wins it wins at its rival's best rate. One run per rate, with a
  seed that no comparison uses; the records are shared by all studies.

  Raises:
    InputError: every rate has diverged.
  """
  scale: Scale = lab.scale
  rates = scale.learning_rates
  if len(rates) == 1:
    return rates[0]
  tokens = scale.tokens[len(scale.tokens) // 2]
  runs = [
    Run(
      f"rate {rate:g}",
      lab.config(
        scale.model, tokens=tokens, seed=TUNING_SEED, learning_rate=rate
      ),
      {"learning_rate": rate},
    )
    for rate in rates
  ]
  records = lab.measure_all(
    runs, lambda trained: measure_losses(lab, trained), name="tuning"
  )
  finished = [record for record in records if "diverged" not in record]
  require(finished, "learning_rates", rates, "one at which no run diverges")
  best = min(finished, key=lambda record: record["loss"]["validation"]["on"])
  return best["labels"]["learning_rate"]


def losses_of(
  records: list[dict[str, Any]], *, corpus: str = "validation"
) -> dict[str, list[float]]:
  """Losses with the memory on, by group and seed."""
  return {
    group: [record["loss"][corpus]["on"] for record in found]
    for group, found in by_group(records).items()
  }
