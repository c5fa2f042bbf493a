"""Study 6, second half: a trained memory is edited, swapped and grown.

The paper trains memory and backbone together, once. Others have since reported
that facts can be put into rows alone, smaller and more local than by LoRA (User
as Engram, TinyEngram; no controls of equal size). Asked here, the backbone and
the fusion always frozen:

  edits   known facts get another value, by rows alone or by LoRA of as many
          trained numbers: efficacy, paraphrase, and what else changed
  swap    two memories taught two sets of new facts over one backbone: does each
          know its own facts, and only these?
  growth  a small memory is trained on, as it is, with more rows per head, or
          with another n-gram order

What is taught in `edits` is tried at three rates per method; the one with the
best efficacy + paraphrase - (facts of other entities lost), on the mean over
seeds, stands for it, and all are in the records.
"""

import pathlib
from typing import Any

import numpy as np

from experiments.lab.edits import measure_edits
from experiments.lab.figures import Bars, draw_panels
from experiments.lab.knowledge import MEMORY, ROWS, group_of
from experiments.lab.knowledge import runs as knowledge_runs
from experiments.lab.other_memories import measure_growth, measure_swap
from experiments.lab.runs import Laboratory, Run, Trained, by_group
from experiments.lab.statistics import mean_interval, paired_difference
from experiments.lab.study import Study
from experiments.lab.worlds import in_percent

BY_ROWS, BY_LORA = "rows of the names", "LoRA"


def runs(lab: Laboratory) -> list[Run]:
  """The full memory of the first half of the study, and its smallest one."""
  smallest = min(ROWS[lab.scale.name], default=None)
  growing = MEMORY if smallest is None else group_of(smallest)
  return [run for run in knowledge_runs(lab) if run.group in (MEMORY, growing)]


def measure(lab: Laboratory, trained: Trained) -> dict[str, Any]:
  """Edits and swaps of the full memory; growth of the smallest one.

  At smoke scale there is one memory for both.
  """
  found: dict[str, Any] = {}
  if trained.run.group == MEMORY:
    found["edits"] = measure_edits(lab, trained)
    found["swap"] = measure_swap(lab, trained)
  if trained.run.group != MEMORY or not ROWS[lab.scale.name]:
    found["growth"] = measure_growth(lab, trained)
  return found


def analyze(lab: Laboratory, records: list[dict[str, Any]]) -> dict[str, Any]:
  """Means over seeds, and rows against LoRA."""
  del lab
  finished = [r for found in by_group(records).values() for r in found]
  parts = {
    name: [record[name] for record in finished if name in record]
    for name in ("edits", "swap", "growth")
  }
  result: dict[str, Any] = {
    name: (_analyze_edits if name == "edits" else _means)(seeds)
    for name, seeds in parts.items()
    if seeds
  }
  return result | _verdict(result)


def _means(seeds: list[Any]) -> Any:
  """Nested dicts of numbers, one per seed, to the same of intervals."""
  if isinstance(seeds[0], dict):
    return {name: _means([seed[name] for seed in seeds]) for name in seeds[0]}
  return mean_interval(seeds)


def _analyze_edits(seeds: list[list[dict[str, Any]]]) -> dict[str, Any]:
  """Each method at its best rate, and the differences of rows and LoRA."""
  before = [records[0] for records in seeds]
  chosen: dict[str, list[dict[str, Any]]] = {}
  scores: dict[str, float] = {}
  for same in zip(*(records[1:] for records in seeds)):
    score = float(np.mean([_score(*pair) for pair in zip(same, before)]))
    method = same[0]["method"]
    if score > scores.get(method, -np.inf):
      scores[method], chosen[method] = score, list(same)
  fields = ("rate", "trained_numbers", "accuracy", "divergence", "text_loss")
  methods = {
    name: _means([{f: r[f] for f in fields} for r in found])
    for name, found in {"before": before, **chosen}.items()
  }
  differences = {
    name: paired_difference(
      *(
        [_number(r, name) for r in side]
        for side in (chosen[BY_ROWS], chosen[BY_LORA])
      )
    )
    for name in (*before[0]["accuracy"], "divergence", "text_loss")
  }
  return {"methods": methods, "rows_minus_lora": differences}


def _number(record: dict[str, Any], name: str) -> float:
  return record["accuracy"].get(name, record.get(name))


def _score(record: dict[str, Any], before: dict[str, Any]) -> float:
  accuracy = record["accuracy"]
  lost = before["accuracy"]["other entities"] - accuracy["other entities"]
  return accuracy["efficacy"] + accuracy["paraphrase"] - lost


def _verdict(result: dict[str, Any]) -> dict[str, str]:
  edits = result.get("edits")
  divergence = edits and edits["rows_minus_lora"]["divergence"]
  if not divergence or divergence["low"] is None:
    finding = "Fewer than two seeds: no interval."
    return {"verdict": "too weak to tell", "finding": finding}
  rows, lora = (edits["methods"][name] for name in (BY_ROWS, BY_LORA))

  def told(method):
    learnt = method["accuracy"]["paraphrase"]["mean"]
    moved = method["divergence"]["mean"]
    return f"{learnt:.0%} in other wordings, {moved:.3f} nats elsewhere"

  count = rows["trained_numbers"]["mean"]
  finding = (
    f"Facts changed by {count:.0f} numbers of rows alone: {told(rows)}; by "
    f"{lora['trained_numbers']['mean']:.0f} of LoRA: {told(lora)}."
  )
  learnt = edits["rows_minus_lora"]["paraphrase"]
  has_learnt = rows["accuracy"]["paraphrase"]["mean"] > 0.5
  if divergence["high"] < 0 and learnt["high"] >= 0 and has_learnt:
    return {"verdict": "reproduced", "finding": finding}
  if divergence["low"] > 0 or learnt["high"] < 0:
    return {"verdict": "contradicted", "finding": finding}
  return {"verdict": "not seen", "finding": finding}


def draw(result: dict[str, Any], path: pathlib.Path) -> None:
  """What edits reach and spare, the swap, and growth."""

  panels = []
  if "edits" in result:
    methods = result["edits"]["methods"]
    values = {
      f"{kind}: {name}": in_percent(method["accuracy"][kind])
      for kind in methods["before"]["accuracy"]
      for name, method in methods.items()
    }
    panels.append(
      Bars(values, title="Facts changed", xlabel="right answers (%)")
    )
    values = {
      f"{kind}: {name}": in_percent(x)
      for kind in result["swap"]["before"]
      for name, found in result["swap"].items()
      for x in (found[kind],)
    }
    panels.append(
      Bars(values, title="Memories swapped", xlabel="right answers (%)")
    )
  if "growth" in result:
    values = {
      name: in_percent(found["accuracy"])
      for name, found in result["growth"].items()
    }
    title = "A small memory, trained on by rows alone"
    panels.append(Bars(values, title=title, xlabel="right answers (%)"))
  title = "A trained memory is edited, swapped, grown (bars: 95 % over seeds)"
  draw_panels(panels, path, title=title)


STUDY = Study("knowledge_editing", runs, measure, analyze, draw)

if __name__ == "__main__":
  STUDY.main()
