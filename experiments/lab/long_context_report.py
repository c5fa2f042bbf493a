"""What the runs of `long_context.py` say: tables, a verdict, the picture."""

import itertools
import pathlib
from typing import Any

import numpy as np

from engram_jax.errors import require
from experiments.lab.figures import Bars, Lines, draw_panels
from experiments.lab.runs import Laboratory, by_group, matched
from experiments.lab.statistics import mean_interval, paired_difference

EXPERTS = "experts"
MEMORY_LOSS = "memory, equal loss"
MEMORY_TEXT = "memory, equal text"
MODELS = (EXPERTS, MEMORY_LOSS, MEMORY_TEXT)

#: Tasks in which the paper finds a large difference.
PAPERS_TASKS = ("multi-query", "tracking")
#: A task is learnt if a model is so much above chance in it (share of 1).
LEARNT = 0.1
#: Losses so near to each other (nats) are called equal.
EQUAL_LOSS = 0.02


def _accuracy(
  record: dict[str, Any],
  *,
  tasks: tuple[str, ...],
  lengths: tuple[str, ...],
  depths: tuple[str, ...] = (),
) -> float:
  """Mean share of right answers; of all depths if none are named."""
  found = [
    [x for depth, x in of_depth.items() if not depths or depth in depths]
    for task in tasks
    for length, of_depth in record["accuracy"][task].items()
    if length in lengths
  ]
  return float(np.mean(found))


def analyze(lab: Laboratory, records: list[dict[str, Any]]) -> dict[str, Any]:
  """Accuracies by task, length and depth, and the memory's differences."""
  groups = by_group(records)
  require(groups, "runs", "none is finished", "one that has not diverged")
  first = next(iter(groups.values()))[0]
  tasks = tuple(first["accuracy"])
  lengths = tuple(first["accuracy"][tasks[0]])
  depths = tuple(first["accuracy"][tasks[0]][lengths[0]])
  longest = lengths[-1:]
  rows = []
  for (model, found), length in itertools.product(groups.items(), lengths):
    for task, depth in itertools.product(tasks, (None, *depths)):
      where = {"lengths": (length,), "depths": (depth,) if depth else ()}
      share = [_accuracy(r, tasks=(task,), **where) for r in found]
      row = {"model": model, "task": task, "length": int(length)}
      row |= {"depth": depth and float(depth), "accuracy": mean_interval(share)}
      rows.append(row)
  differences: dict[str, Any] = {}
  for model in MODELS[1:]:
    pairs = matched(groups.get(model, []), groups.get(EXPERTS, []))
    if not pairs:
      continue
    named = {task: (task,) for task in tasks} | {"all": tasks}
    named["the paper's two"] = PAPERS_TASKS
    differences[model] = {
      name: paired_difference(
        *(
          [_accuracy(r, tasks=chosen, lengths=longest) for r in side]
          for side in zip(*pairs)
        )
      )
      for name, chosen in named.items()
    }
  result = {
    "tasks": list(tasks),
    "longest": int(longest[0]),
    "chance": first["chance"],
    "accuracy": rows,
    "differences": differences,
    "before_extension": _before(groups),
    "loss": {
      name: mean_interval([r["loss"]["on"] for r in found])
      for name, found in groups.items()
    },
  }
  return result | _verdict(result)


def _before(groups) -> dict[str, Any]:
  """Losses from which the second stage starts, and how near they are."""
  found = {}
  for name, records in groups.items():
    labels = [record["labels"] for record in records]
    gaps = [
      x["short_loss"] - x["rivals_short_loss"]
      for x in labels
      if x["rivals_short_loss"] is not None
    ]
    found[name] = {
      "loss": mean_interval([x["short_loss"] for x in labels]),
      "share_of_text": [x["share_of_text"] for x in labels],
      "more_than_experts": mean_interval(gaps) if gaps else None,
      "largest_gap": max(map(abs, gaps)) if gaps else None,
    }
  return found


def _verdict(result: dict[str, Any]) -> dict[str, str]:
  """On the paper's two tasks, at equal loss and the longest length."""
  found = result["differences"].get(MEMORY_LOSS)
  if found is None:
    finding = "No pair of models is finished."
    return {"verdict": "too weak to tell", "finding": finding}
  difference = found["the paper's two"]
  gap = result["before_extension"][MEMORY_LOSS]["largest_gap"]
  best = {
    task: max(
      row["accuracy"]["mean"]
      for row in result["accuracy"]
      if row["task"] == task
      and row["length"] == result["longest"]
      and row["depth"] is None
    )
    for task in PAPERS_TASKS
  }
  learnt = [
    task for task in best if best[task] > result["chance"][task] + LEARNT
  ]
  points = 100 * difference["mean"]
  finding = (
    f"At {result['longest']} tokens and losses that differ by at most "
    f"{gap:.3f} nats, the memory answers {points:+.1f} points more of "
    "multi-query and tracking"
  )
  if not learnt:
    finding += "; neither model has learnt either task at this size"
    return {"verdict": "too weak to tell", "finding": finding + "."}
  low, high = difference["low"], difference["high"]
  if low is None or (low <= 0 <= high and high - low > 2 * LEARNT):
    verdict = "too weak to tell"
  elif gap > EQUAL_LOSS:
    finding += "; the losses are not equal"
    verdict = "too weak to tell"
  elif low > 0:
    verdict = "reproduced"
  else:
    verdict = "contradicted" if high < 0 else "not seen"
  if low is not None:
    finding += f" (95 %: {100 * low:+.1f} to {100 * high:+.1f})"
  return {"verdict": verdict, "finding": finding + "."}


def _percent(interval: dict[str, Any]) -> dict[str, Any]:
  names = ("mean", "low", "high")
  found = {n: interval[n] and 100 * interval[n] for n in names}
  return {**interval, **found}


def draw(result: dict[str, Any], path: pathlib.Path) -> None:
  """Differences, then accuracy by task, length and depth."""
  longest, rows = result["longest"], result["accuracy"]
  panels: list[Bars | Lines] = []
  found = result["differences"].get(MEMORY_LOSS)
  if found:
    panels.append(
      Bars(
        {name: _percent(x) for name, x in found.items()},
        title=f"Memory over experts, equal loss, {longest} tokens",
        xlabel="more right answers (percentage points)",
      )
    )
  panels.append(
    Bars(
      {
        f"{row['task']}: {row['model']}": _percent(row["accuracy"])
        for task in result["tasks"]
        for row in rows
        if row["length"] == longest
        and row["depth"] is None
        and row["task"] == task
      },
      title=f"Every task, {longest} tokens",
      xlabel="right answers (%)",
      zero=False,
    )
  )
  for axis, xlabel in (
    ("length", "length of the text (tokens)"),
    ("depth", "place of the first needle (0: beginning, 1: end)"),
  ):
    lines = {}
    for model in MODELS:
      chosen = [
        row
        for row in rows
        if row["model"] == model
        and (row["depth"] is None) == (axis == "length")
        and (axis == "length" or row["length"] == longest)
      ]
      places = sorted({row[axis] for row in chosen})
      if places:
        lines[model] = [
          (x, _percent(_mean_of_tasks(chosen, axis, x))) for x in places
        ]
    panels.append(
      Lines(
        lines,
        title=f"Mean of the tasks by {axis}",
        xlabel=xlabel,
        ylabel="right answers (%)",
      )
    )
  draw_panels(
    panels,
    path,
    title="What a long text said once (bars: 95 % over seeds, of differences "
    "and tasks; means have none)",
  )


def _mean_of_tasks(rows, axis: str, place: float) -> dict[str, Any]:
  """Mean over tasks of one model at one place, without an interval."""
  means = [row["accuracy"]["mean"] for row in rows if row[axis] == place]
  return {"mean": float(np.mean(means)), "low": None, "high": None}
