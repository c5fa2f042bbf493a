"""Which parts of the memory matter, and where it belongs.

The paper (§5, Fig. 5) takes one part away at a time from a memory of equal
parameters: the gate, the compression of tokens, the keys of each stream, the
convolution; adds 4-grams; and moves the memory from block to block. It reports
no seeds. Asked here with them, at the middle length of training, as differences
to the same memory with all its parts, seed by seed. Besides: the tables' rate
and optimizer (each at the best of three rates, tuned with a seed of its own),
and how rows start.

  python -m experiments.lab.ablation --scale=cpu
"""

import dataclasses
import pathlib
from typing import Any

from engram_jax.config import ModelConfig
from engram_jax.errors import require
from experiments.lab.figures import Bars, draw_panels
from experiments.lab.runs import Laboratory, Run, by_group, matched
from experiments.lab.scales import SHARE
from experiments.lab.statistics import mean_interval, paired_difference
from experiments.lab.study import (
  TUNING_SEED,
  Study,
  measure_losses,
  tuned_learning_rate,
)

#: The memory with all its parts.
WHOLE = "whole"
#: The tables' learning rate over the backbone's; the paper has 5.
MULTIPLIERS = (1.0, 5.0, 25.0)
OPTIMIZERS = ("dense_adam", "rowwise_adagrad", "sinkhorn")
TITLES = {
  "part": "without a part, or with one more",
  "place": "placement",
  "rows": "how the rows learn and start",
  "control": "controls",
}


def _models(lab: Laboratory) -> dict[tuple[str, str], ModelConfig]:
  """The model of each variant, by kind and name; equal parameters."""
  scale = lab.scale
  layout, blocks = scale.layout, scale.model.num_layers

  def memory(**changes) -> ModelConfig:
    return scale.with_memory(SHARE, **changes)

  rows = layout.rows_per_head
  streams = dataclasses.replace(scale.model, streams=2)
  two = scale.with_memory(SHARE, model=streams, streams=2)
  shared = dataclasses.replace(two.engram, per_stream_keys=False)
  found = {
    ("whole", WHOLE): memory(),
    ("part", "without the gate"): memory(gate=False),
    ("part", "without compression"): memory(compress=False),
    ("part", "without the convolution"): memory(short_conv=False),
    ("part", "without the signed root"): memory(signed_sqrt=False),
    ("part", "with 4-grams"): memory(rows_per_head=(*rows, rows[-1])),
    ("part", "two streams"): two,
    ("part", "two streams, one key"): dataclasses.replace(two, engram=shared),
    ("control", "no memory"): scale.model,
    ("control", "one row"): memory(addressing="one_row"),
    ("control", "shuffled"): memory(addressing="shuffled"),
    ("control", "unigrams"): memory(smallest_order=1, rows_per_head=rows[:1]),
    ("control", "on top (more parameters)"): dataclasses.replace(
      scale.model, engram=memory().engram
    ),
    ("rows", "start at 0"): memory(table_init_std=0.0),
    ("rows", "start at std 1"): memory(table_init_std=1.0),
  }
  for block in range(blocks):
    if (block,) != layout.layers:
      found["place", f"at block {block}"] = memory(layers=(block,))
  if blocks > 2:
    both = (layout.layers[0], blocks // 2)
    found["place", f"at blocks {both[0]} and {both[1]}"] = memory(layers=both)
  if scale.name == "smoke":
    kept = (WHOLE, "no memory", "without the gate")
    found = {key: model for key, model in found.items() if key[1] in kept}
  return found


def _tuned_multiplier(lab: Laboratory, optimizer: str, rate: float) -> float:
  """The best of `MULTIPLIERS` for a row optimizer, with the tuning's seed."""
  model = lab.scale.with_memory()
  runs = [
    _run(
      lab,
      "tuning",
      f"{optimizer} x{multiplier:g}",
      model,
      TUNING_SEED,
      rate,
      table_optimizer=optimizer,
      table_learning_rate_multiplier=multiplier,
    )
    for multiplier in MULTIPLIERS
  ]
  records = lab.measure_all(
    runs, lambda trained: measure_losses(lab, trained), name="tuning"
  )
  losses = {
    multiplier: record["loss"]["validation"]["on"]
    for multiplier, record in zip(MULTIPLIERS, records)
    if "diverged" not in record
  }
  valid = "one at which no run diverges"
  require(losses, f"multipliers of {optimizer}", MULTIPLIERS, valid)
  return min(losses, key=losses.get)


def _run(lab, kind, name, model, seed, rate, **train) -> Run:
  tokens = lab.scale.tokens[len(lab.scale.tokens) // 2]
  config = lab.config(
    model, tokens=tokens, seed=seed, learning_rate=rate, **train
  )
  return Run(name, config, {"kind": kind, "name": name, "tokens": tokens})


def runs(lab: Laboratory) -> list[Run]:
  """Every variant, seed by seed, so that a stopped study has compared all."""
  scale, rate = lab.scale, tuned_learning_rate(lab)
  variants = [
    (kind, name, model, {}) for (kind, name), model in _models(lab).items()
  ]
  if scale.name != "smoke":
    memory = scale.with_memory()
    variants += [
      (
        "rows",
        f"tables' rate x{multiplier:g}",
        memory,
        {"table_learning_rate_multiplier": multiplier},
      )
      for multiplier in MULTIPLIERS
      if multiplier != 5.0
    ]
    for optimizer in OPTIMIZERS:
      best = _tuned_multiplier(lab, optimizer, rate)
      train = {
        "table_optimizer": optimizer,
        "table_learning_rate_multiplier": best,
      }
      name = f"{optimizer.replace('_', ' ')}, rate x{best:g}"
      variants.append(("rows", name, memory, train))
  return [
    _run(lab, kind, name, model, seed, rate, **train)
    for seed in scale.seeds
    for kind, name, model, train in variants
  ]


def analyze(lab: Laboratory, records: list[dict[str, Any]]) -> dict[str, Any]:
  """Each variant's difference to the whole memory; above 0 it is worse."""
  groups, points = by_group(records), []
  for name, found in groups.items():
    point = {
      **found[0]["labels"],
      "parameters": found[0]["parameters"]["total"],
      "loss": mean_interval([r["loss"]["validation"]["on"] for r in found]),
    }
    # One stream and two are different backbones: each has its own whole.
    whole = "two streams" if name == "two streams, one key" else WHOLE
    pairs = matched(found, groups.get(whole, []))
    if pairs and name != WHOLE:
      for key, corpus in (("worse", "validation"), ("worse_prose", "prose")):
        point[key] = paired_difference(
          [a["loss"][corpus]["on"] for a, _ in pairs],
          [b["loss"][corpus]["on"] for _, b in pairs],
        )
    points.append(point)
  return {"points": points, **_verdict(points)}


def _verdict(points: list[dict[str, Any]]) -> dict[str, str]:
  """On the paper's claim that gate and compression matter most."""
  worse = {p["name"]: p["worse"] for p in points if "worse" in p}
  parts = [p["name"] for p in points if p["kind"] == "part" and "worse" in p]
  parts = [name for name in parts if name.startswith("without")]
  if not parts:
    return {"verdict": "too weak to tell", "finding": "No part is compared."}
  order = sorted(parts, key=lambda name: -worse[name]["mean"])
  finding = "Taken away, in the order of what it costs: " + "; ".join(
    f"{name.removeprefix('without ')} {worse[name]['mean']:+.4f}"
    for name in order
  )
  sure = [n for n in parts if (worse[n]["low"] or -1) > 0]
  if not sure:
    return {"verdict": "too weak to tell", "finding": finding + " nats."}
  named = {"without the gate", "without compression"}
  ok = named <= set(sure)
  verdict = "reproduced" if ok else "not seen"
  return {"verdict": verdict, "finding": finding + " nats."}


def draw(result: dict[str, Any], path: pathlib.Path) -> None:
  """What each variant costs, a panel a kind."""
  panels = []
  for kind, title in TITLES.items():
    values = {
      p["name"]: p["worse"]
      for p in result["points"]
      if p["kind"] == kind and "worse" in p
    }
    if values:
      panels.append(Bars(values, title=title, xlabel="higher loss (nats)"))
  draw_panels(
    panels,
    path,
    title="What the memory's parts are worth, against the whole one "
    "(bars: 95 % over seeds)",
  )


STUDY = Study("ablation", runs, measure_losses, analyze, draw)

if __name__ == "__main__":
  STUDY.main()
