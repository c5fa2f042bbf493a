"""One field, several values, several seeds: the final loss of each.

A run that diverges is named in the table and in the result, and left out of the
mean of its value; the others go on.

  python -m experiments.ablate --config=experiments/configs/tiny.py \
    --workdir=runs/table_init --field=model.engram.table_init_std \
    --values=0.0,0.02,1.0 --out=experiments/results/table_init.json
"""

import ast
import pathlib
from typing import Any

from absl import flags

from engram_jax.config_dicts import to_dict
from experiments import cli, number_flags
from experiments.results import require_place, write_result
from experiments.sweeps import (
  changed,
  finished,
  runs_of,
  spread,
  train_seeds,
)

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of all the runs.")
_FIELD = flags.DEFINE_string("field", None, "E.g. model.engram.short_conv.")
_VALUES = flags.DEFINE_list("values", None, "Python literals, or plain words.")
_SEEDS = number_flags.define("seeds", [0, 1], "Of every value.")
_BATCHES = flags.DEFINE_integer("eval_batches", 40, "Of the final evaluation.")
_OUT = flags.DEFINE_string("out", None, "JSON file of the result.")
flags.mark_flags_as_required(["config", "workdir", "field", "values", "out"])


def parse(value: str) -> Any:
  """`value` as a Python literal; a word that is none stays a string."""
  try:
    return ast.literal_eval(value)
  except (ValueError, SyntaxError):
    return value


def main(argv) -> None:
  del argv
  require_place(_OUT.value)
  config, field = cli.frozen(_CONFIG.value), _FIELD.value
  # Every value is checked before the first run begins.
  variants = {v: changed(config, {field: parse(v)}) for v in _VALUES.value}
  with runs_of(config, len(variants) * len(_SEEDS.value)) as advance:
    results = {
      value: train_seeds(
        value,
        variant,
        pathlib.Path(_WORKDIR.value).expanduser(),
        seeds=_SEEDS.value,
        eval_batches=_BATCHES.value,
        advance=advance,
      )
      for value, variant in variants.items()
    }
  write_result(
    _OUT.value,
    {"field": field, "config": to_dict(config), "results": results},
  )
  rows = []
  for value, records in results.items():
    good = finished(records)
    text = spread([record["loss"]["on"] for record in good])
    if lost := [str(r["seed"]) for r in records if r not in good]:
      text += f"  diverged: seed {', '.join(lost)}"
    rows.append((value, text))
  print(cli.table(rows, f"Validation loss by {field}, nats per token"))


if __name__ == "__main__":
  cli.run(main)
