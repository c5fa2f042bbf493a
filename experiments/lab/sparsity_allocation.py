"""How a budget of sparse parameters is best split: experts or memory?

The paper (§3, Fig. 3) holds the total and the activated parameters of a model,
gives a share 1 - rho of its sparse parameters to a memory, and finds a loss
that is U-shaped in the share, least at 20 to 25 %, 0.014 nats below a model of
experts alone. Asked here: is there such a U at a size that anybody can train,
and does it last? So the same question is put at several lengths of training and
two budgets, with controls:

  one row        every head reads one row: a memory without any knowledge
  shuffled       every position reads another's rows: the same work, no identity
  unigrams       rows of single tokens, equal parameters
  on top         the memory added to all experts: *not* of equal parameters

  python -m experiments.lab.sparsity_allocation --scale=cpu
"""

import dataclasses
import itertools
import pathlib
from typing import Any

import numpy as np

from experiments.lab.figures import Lines, draw_panels
from experiments.lab.runs import Laboratory, Run, by_group, matched
from experiments.lab.scales import SHARE
from experiments.lab.statistics import (
  bootstrap,
  detectable_difference,
  mean_interval,
  paired_difference,
  parabola_minimum,
  pooled_sd,
)
from experiments.lab.study import Study, measure_losses, tuned_learning_rate

#: What the paper finds between a share of 0 and the best one, in nats.
PAPERS_EFFECT = 0.0139


def _models(lab: Laboratory) -> dict[str, dict[float, Any]]:
  """The model of every share, by budget."""
  scale = lab.scale
  budgets = {"large": scale.model}
  if scale.small_experts:
    moe = dataclasses.replace(scale.model.moe, num_experts=scale.small_experts)
    budgets["small"] = dataclasses.replace(scale.model, moe=moe)
  return {
    name: {
      share: scale.with_memory(share, model=model) for share in scale.shares
    }
    for name, model in budgets.items()
  }


def _controls(lab: Laboratory) -> dict[str, Any]:
  """Models at the share of `SHARE` that lack one thing, by name."""
  scale = lab.scale
  memory = scale.with_memory()
  rows = scale.layout.rows_per_head[:1]
  one_row = {"one row": scale.with_memory(addressing="one_row")}
  if scale.name == "smoke":
    return one_row
  return one_row | {
    "shuffled": scale.with_memory(addressing="shuffled"),
    "unigrams": scale.with_memory(smallest_order=1, rows_per_head=rows),
    "on top": dataclasses.replace(scale.model, engram=memory.engram),
  }


def runs(lab: Laboratory) -> list[Run]:
  """The pilot; then the shares, short runs first; then the controls."""
  scale, rate = lab.scale, tuned_learning_rate(lab)
  models, controls = _models(lab), _controls(lab)

  def run(kind, budget, name, model, tokens, seed) -> Run:
    config = lab.config(model, tokens=tokens, seed=seed, learning_rate=rate)
    labels = {"kind": kind, "budget": budget, "name": name, "tokens": tokens}
    return Run(f"{kind} {budget} {name} {tokens}", config, labels)

  middle = scale.tokens[len(scale.tokens) // 2]
  pilot = [
    run("pilot", "large", share, models["large"][share], middle, seed)
    for share, seed in itertools.product((0.0, SHARE), scale.pilot_seeds)
  ]
  main = [
    run("share", budget, share, models[budget][share], tokens, seed)
    for budget, tokens, seed, share in itertools.product(
      models, scale.tokens, scale.seeds, scale.shares
    )
  ]
  others = [
    run("control", "large", name, model, tokens, seed)
    for tokens, seed, (name, model) in itertools.product(
      scale.tokens, scale.seeds, controls.items()
    )
  ]
  # By length, so that a study that is stopped has compared something.
  order = {"pilot": 0, "share": 1, "control": 2}
  budgets = {"large": 0, "small": 1}
  return pilot + sorted(
    main + others,
    key=lambda r: (
      r.labels["tokens"],
      budgets[r.labels["budget"]],
      order[r.labels["kind"]],
    ),
  )


def analyze(lab: Laboratory, records: list[dict[str, Any]]) -> dict[str, Any]:
  """Curves, differences to no memory, the minimum, and the power."""
  groups = by_group(records)
  first = {name: found[0]["labels"] for name, found in groups.items()}
  points, minima = [], []
  for name, found in groups.items():
    labels = first[name]
    base = groups.get(f"share {labels['budget']} 0.0 {labels['tokens']}", [])
    pairs = matched(found, base)
    point = {
      **labels,
      "parameters": found[0]["parameters"]["total"],
      "loss": mean_interval([r["loss"]["validation"]["on"] for r in found]),
      "prose": mean_interval([r["loss"]["prose"]["on"] for r in found]),
    }
    if pairs and labels["kind"] != "pilot" and labels["name"] != 0.0:
      for key, corpus in (("gain", "validation"), ("gain_prose", "prose")):
        point[key] = paired_difference(
          [b["loss"][corpus]["on"] for _, b in pairs],
          [a["loss"][corpus]["on"] for a, _ in pairs],
        )
    points.append(point)
  for budget, tokens in itertools.product(("large", "small"), lab.scale.tokens):
    minima += _minimum(groups, budget, tokens, lab.scale.shares)
  result = {"points": points, "minima": minima, **_power(groups, lab)}
  return {**result, **_verdict(points, minima, result, lab)}


def _minimum(
  groups, budget: str, tokens: int, shares: tuple[float, ...]
) -> list[dict[str, Any]]:
  """The fitted minimum over the shares, if all are there."""
  found = [groups.get(f"share {budget} {share} {tokens}") for share in shares]
  if not all(found):
    return []
  losses = [[r["loss"]["validation"]["on"] for r in group] for group in found]
  place = bootstrap(losses, lambda means: parabola_minimum(shares, means)[0])
  means = np.array([np.mean(x) for x in losses])
  return [
    {
      "budget": budget,
      "tokens": tokens,
      "share": place,
      "coefficients": parabola_minimum(shares, means)[1].tolist(),
      "best_measured": shares[int(means.argmin())],
      "inside": 0 < int(means.argmin()) < len(shares) - 1,
    }
  ]


def _power(groups, lab: Laboratory) -> dict[str, Any]:
  """What the pilot says that the study can see."""
  pilot = [
    [r["loss"]["validation"]["on"] for r in found]
    for name, found in groups.items()
    if name.startswith("pilot") and len(found) > 1
  ]
  if not pilot:
    return {"power": None}
  sd, seeds = pooled_sd(pilot), len(lab.scale.seeds)
  return {
    "power": {
      "sd": sd,
      "seeds": seeds,
      "detectable": detectable_difference(sd["sd"], seeds),
      "detectable_at_upper_sd": detectable_difference(sd["upper"], seeds),
      "papers_effect": PAPERS_EFFECT,
    }
  }


def _verdict(points, minima, result, lab: Laboratory) -> dict[str, str]:
  """A verdict on the U, from the longest length that is complete."""
  done = [m for m in minima if m["budget"] == "large"]
  if not done:
    return {
      "verdict": "too weak to tell",
      "finding": "No length has all its shares yet.",
    }
  last = max(done, key=lambda m: m["tokens"])
  gains = {
    p["name"]: p["gain"]
    for p in points
    if p["kind"] == "share"
    and p["budget"] == "large"
    and p["tokens"] == last["tokens"]
    and p["name"]
  }
  best = max(gains, key=lambda share: gains[share]["mean"])
  gain, worst = gains[best], gains[max(gains)]
  low = gain["low"] if gain["low"] is not None else -np.inf
  finding = (
    f"At {last['tokens'] / 1e6:g} million tokens the best share measured is "
    f"{best:.0%}: {gain['mean']:+.3f} nats better than experts alone; the "
    f"largest, {max(gains):.0%}, is {worst['mean']:+.3f} better."
  )
  if low <= 0:
    return {"verdict": "too weak to tell", "finding": finding}
  falls = gain["mean"] - worst["mean"]
  power = result["power"]
  seen = power["detectable"] if power else np.inf
  if best != max(gains) and falls > seen:
    return {"verdict": "reproduced", "finding": finding}
  return {"verdict": "not seen", "finding": finding}


def draw(result: dict[str, Any], path: pathlib.Path) -> None:
  """Loss over the share, gain over tokens, and the controls."""
  points = result["points"]

  def lines(budget: str):
    found: dict[str, list] = {}
    for p in points:
      if p["kind"] == "share" and p["budget"] == budget:
        name = f"{p['tokens'] / 1e6:g} M tokens"
        found.setdefault(name, []).append((100 * p["name"], p["loss"]))
    return found

  panels = [
    Lines(
      lines(budget),
      title=f"{budget.capitalize()} budget",
      xlabel="the memory's share of sparse parameters (%)",
      ylabel="validation loss (nats per token)",
    )
    for budget in ("large", "small")
    if lines(budget)
  ]
  gains: dict[str, list] = {}
  for p in points:
    if p["kind"] == "pilot" or p["budget"] != "large" or "gain" not in p:
      continue
    share = p["name"] if isinstance(p["name"], str) else f"{p['name']:.0%}"
    if p["name"] not in (0.0, 0.1, 0.75):
      gains.setdefault(share, []).append((p["tokens"], p["gain"]))
  if gains:
    panels.append(
      Lines(
        gains,
        title="What it wins over experts alone",
        xlabel="tokens trained on",
        ylabel="lower loss (nats per token)",
        log_x=True,
        zero=True,
      )
    )
  draw_panels(
    panels,
    path,
    title="Experts or memory, at equal parameters (bars: 95 % over seeds)",
  )


STUDY = Study("sparsity_allocation", runs, measure_losses, analyze, draw)

if __name__ == "__main__":
  STUDY.main()
