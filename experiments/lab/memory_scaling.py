"""Does the loss fall as the memory grows, and faster than OverEncoding's?

The paper (§3, Fig. 3) holds the backbone, adds ever more rows and finds a loss
that is linear in the logarithm of their number, falling faster than with
OverEncoding (arXiv 2501.16975), which averages the n-grams' vectors into the
input embedding. Asked here, at three lengths of training: the slope per tenfold
rows of both. Nothing is of equal parameters here: rows come on top, as in the
paper. Controls: no memory, one row in every head, rows of single tokens.

  python -m experiments.lab.memory_scaling --scale=cpu
"""

import dataclasses
import itertools
import pathlib
from typing import Any

import numpy as np

from engram_jax.config import EngramConfig
from experiments.lab.figures import Lines, draw_panels
from experiments.lab.runs import Laboratory, Run, by_group, matched
from experiments.lab.statistics import (
  bootstrap,
  mean_interval,
  paired_difference,
)
from experiments.lab.study import Study, measure_losses, tuned_learning_rate

#: Rows of a head over those of the scale's layout.
FACTORS = (0.25, 1, 4, 16)
NAMES = {"engram": "Engram", "over_encoding": "OverEncoding"}


def _layouts(lab: Laboratory) -> dict[tuple[str, int], EngramConfig | None]:
  """The memory of every kind and number of rows a head."""
  layout = lab.scale.layout
  factors = FACTORS if lab.scale.name != "smoke" else FACTORS[:2]
  sizes = [round(f * layout.rows_per_head[0]) for f in factors]
  found: dict[tuple[str, int], EngramConfig | None] = {("none", 0): None}
  for rows in sizes:
    both = (rows,) * len(layout.rows_per_head)
    engram = dataclasses.replace(layout, rows_per_head=both)
    found["engram", rows] = engram
    found["over_encoding", rows] = dataclasses.replace(
      engram, layers=(0,), fusion="input_average", short_conv=False
    )
  if lab.scale.name == "smoke":
    return found
  largest = dataclasses.replace(layout, rows_per_head=both)
  found["one row", sizes[-1]] = dataclasses.replace(
    largest, addressing="one_row"
  )
  # As many rows of single tokens as there are tokens: a table of its own.
  vocabulary = lab.scale.model.vocab_size
  found["unigrams", vocabulary] = dataclasses.replace(
    layout, smallest_order=1, rows_per_head=(vocabulary,)
  )
  return found


def runs(lab: Laboratory) -> list[Run]:
  """Every memory at every length, short runs first."""
  scale, rate = lab.scale, tuned_learning_rate(lab)
  found = []
  for tokens, seed, ((kind, rows), engram) in itertools.product(
    scale.tokens, scale.seeds, _layouts(lab).items()
  ):
    model = dataclasses.replace(scale.model, engram=engram)
    config = lab.config(model, tokens=tokens, seed=seed, learning_rate=rate)
    labels = {"kind": kind, "rows_per_head": rows, "tokens": tokens}
    found.append(Run(f"{kind} {rows} {tokens}", config, labels))
  return found


def analyze(lab: Laboratory, records: list[dict[str, Any]]) -> dict[str, Any]:
  """Loss and gain per point; per length the slopes and their difference."""
  groups, points = by_group(records), []
  for found in groups.values():
    labels = found[0]["labels"]
    pairs = matched(found, groups.get(f"none 0 {labels['tokens']}", []))
    point = {
      **labels,
      "table_parameters": found[0]["parameters"]["tables"],
      "loss": mean_interval([r["loss"]["validation"]["on"] for r in found]),
      "prose": mean_interval([r["loss"]["prose"]["on"] for r in found]),
    }
    if pairs:
      point["gain"] = paired_difference(
        [b["loss"]["validation"]["on"] for _, b in pairs],
        [a["loss"]["validation"]["on"] for a, _ in pairs],
      )
    points.append(point)
  slopes = []
  for tokens, kind in itertools.product(lab.scale.tokens, NAMES):
    mine = sorted(
      (p for p in points if (p["kind"], p["tokens"]) == (kind, tokens)),
      key=lambda p: p["rows_per_head"],
    )
    if len(mine) < 2:
      continue
    x = np.log10([p["rows_per_head"] for p in mine])
    losses = [
      [
        r["loss"]["validation"]["on"]
        for r in groups[f"{kind} {p['rows_per_head']} {tokens}"]
      ]
      for p in mine
    ]
    slope = bootstrap(losses, lambda means, x=x: np.polyfit(x, means, 1)[0])
    fit = np.polyfit(x, [np.mean(v) for v in losses], 1)
    rest = [np.mean(v) for v in losses] - np.polyval(fit, x)
    slopes.append(
      {
        "kind": kind,
        "tokens": tokens,
        "nats_per_tenfold_rows": slope,
        "largest_departure_from_the_line": float(np.abs(rest).max()),
      }
    )
  return {"points": points, "slopes": slopes, **_verdict(slopes)}


def _verdict(slopes: list[dict[str, Any]]) -> dict[str, str]:
  """On the slope and on the lead over OverEncoding, at the longest length."""
  both = {}
  for slope in slopes:
    both.setdefault(slope["tokens"], {})[slope["kind"]] = slope
  complete = [tokens for tokens, kinds in both.items() if len(kinds) == 2]
  if not complete:
    return {"verdict": "too weak to tell", "finding": "No length is complete."}
  last = max(complete)
  ours, theirs = (both[last][kind]["nats_per_tenfold_rows"] for kind in NAMES)
  finding = (
    f"At {last / 1e6:g} million tokens tenfold rows change the loss by "
    f"{ours['value']:+.3f} nats ({ours['low']:+.3f} to {ours['high']:+.3f}), "
    f"OverEncoding's by {theirs['value']:+.3f} ({theirs['low']:+.3f} to "
    f"{theirs['high']:+.3f})."
  )
  if ours["high"] < 0 and ours["high"] < theirs["low"]:
    verdict = "reproduced"
  elif theirs["high"] < ours["low"]:
    verdict = "contradicted"
  elif ours["high"] >= 0:
    verdict = "too weak to tell"
  else:
    verdict = "not seen"
  return {"verdict": verdict, "finding": finding}


def draw(result: dict[str, Any], path: pathlib.Path) -> None:
  """Loss over rows, a panel a length."""
  points, panels = result["points"], []
  for tokens in sorted({p["tokens"] for p in points}):
    lines = {
      name: [
        (p["rows_per_head"], p["loss"])
        for p in points
        if (p["kind"], p["tokens"]) == (kind, tokens)
      ]
      for kind, name in {
        **NAMES,
        "unigrams": "unigrams",
        "one row": "one row",
      }.items()
    }
    base = [p for p in points if (p["kind"], p["tokens"]) == ("none", tokens)]
    sizes = [x for line in lines.values() for x, _ in line]
    if base and sizes:
      ends = (min(sizes), max(sizes))
      lines["no memory"] = [(x, base[0]["loss"]) for x in ends]
    lines = {name: line for name, line in lines.items() if line}
    if sizes:
      panels.append(
        Lines(
          lines,
          title=f"{tokens / 1e6:g} million tokens",
          xlabel="rows per head",
          ylabel="validation loss (nats per token)",
          log_x=True,
        )
      )
  draw_panels(
    panels, path, title="More rows on one backbone (bars: 95 % over seeds)"
  )


STUDY = Study("memory_scaling", runs, measure_losses, analyze, draw)

if __name__ == "__main__":
  STUDY.main()
