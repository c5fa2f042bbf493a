"""Study 6, first half: what is known, by how often it was said and by rows.

The paper's models with a memory know more facts than those without (TriviaQA
+1.9 points, PopQA +0.2, MMLU +3.0, at equal parameters and tokens), and lose
facts first when the memory is silenced. Asked here, of facts about invented
entities that the text states a known number of times:

  recall        by frequency, in wordings that were trained on and in others
  two hops      facts that follow from two others and are stated nowhere
  rows          recall by rows per head, the backbone fixed
  dependence    what is left of it when the memory is silenced

against as many parameters in experts, and against a memory of one row per head.
"""

import dataclasses
import pathlib
from typing import Any

from engram_jax.data.synthetic.facts import questions, two_hop_questions
from experiments.lab.figures import Bars, Lines, draw_panels
from experiments.lab.runs import Laboratory, Run, Trained, by_group, matched
from experiments.lab.statistics import (
  detectable_difference,
  mean_interval,
  paired_difference,
  pooled_sd,
)
from experiments.lab.study import Study, tuned_learning_rate
from experiments.lab.worlds import (
  ask_all,
  facts_corpus,
  in_percent,
  summarize,
  whole_text,
  world_of,
)

#: Rows per head of smaller memories over the same backbone, by scale.
ROWS = {"smoke": (), "cpu": (32, 256), "gpu": (256, 1024, 4096)}
EXPERTS, MEMORY, ONE_ROW = "experts", "memory", "one row"
#: What is compared. In wordings that no text has, these models say hardly
#: anything of what they know.
RECALL = "trained wordings"
#: What the paper finds on TriviaQA, in share of the questions.
PAPERS_EFFECT = 0.019


def group_of(rows: int) -> str:
  """Name of the group of a smaller memory."""
  return f"{rows} rows"


def runs(lab: Laboratory) -> list[Run]:
  """Each group with all seeds; each run reads the whole text once."""
  scale, corpus = lab.scale, facts_corpus(lab)
  memory = scale.with_memory()
  models = {EXPERTS: scale.model, MEMORY: memory}
  models[ONE_ROW] = scale.with_memory(addressing="one_row")
  for rows in ROWS[scale.name]:
    engram = dataclasses.replace(
      memory.engram, rows_per_head=(rows,) * len(memory.engram.rows_per_head)
    )
    models[group_of(rows)] = dataclasses.replace(memory, engram=engram)
  rate, tokens = tuned_learning_rate(lab), whole_text(lab, corpus)
  return [
    Run(
      group,
      lab.config(
        model, tokens=tokens, seed=seed, learning_rate=rate, corpus=corpus
      ),
      {"rows": model.engram.rows_per_head[0] if model.engram else 0},
    )
    for seed in scale.seeds
    for group, model in models.items()
  ]


def measure(lab: Laboratory, trained: Trained) -> dict[str, Any]:
  """Accuracy and known bits of every kind of question."""
  world = world_of(lab)
  kinds = {
    "trained wordings": list(questions(world, held_out=False)),
    "other wordings": list(questions(world)),
    "two hops, stated": list(two_hop_questions(world, held_out=False)),
    "two hops, composed": list(two_hop_questions(world)),
  }
  found = {}
  for kind, asked in kinds.items():
    answers = ask_all(trained, asked)
    found[kind] = {
      "all": summarize(answers),
      "by_frequency": summarize(answers, by="frequency"),
    }
  if trained.tables:
    silenced = ask_all(trained, kinds[RECALL], tables={})
    found[f"{RECALL}, silenced"] = {"all": summarize(silenced)}
  rows = sum(table.size for table in trained.tables.values())
  return {"answers": found, "table_parameters": rows}


def _values(records, kind: str, *, frequency: str = "", field="accuracy"):
  """One number per seed."""
  parts = [record["answers"][kind] for record in records]
  if frequency:
    return [part["by_frequency"][frequency][field] for part in parts]
  return [part["all"][field] for part in parts]


def analyze(lab: Laboratory, records: list[dict[str, Any]]) -> dict[str, Any]:
  """Means over seeds, differences to experts seed by seed, and the verdict."""
  groups = by_group(records)
  points = []
  for group, found in groups.items():
    kinds = found[0]["answers"]
    frequencies = kinds[RECALL]["by_frequency"]
    points.append(
      {
        "group": group,
        "rows": found[0]["labels"]["rows"],
        "table_parameters": found[0]["table_parameters"],
        "accuracy": {k: mean_interval(_values(found, k)) for k in kinds},
        "chance": {k: _values(found, k, field="chance")[0] for k in kinds},
        "known_bits": mean_interval(_values(found, RECALL, field="known_bits")),
        "by_frequency": {
          f: mean_interval(_values(found, RECALL, frequency=f))
          for f in sorted(frequencies, key=int)
        },
      }
    )
  gains = {
    group: {
      kind: paired_difference(*_pairs(found, groups[EXPERTS], kind))
      for kind in groups[EXPERTS][0]["answers"]
    }
    for group, found in groups.items()
    if EXPERTS in groups and group != EXPERTS
    if matched(found, groups[EXPERTS])
  }
  result = {"points": points, "gain_over_experts": gains}
  several = [g for g in groups.values() if len(g) > 1]
  if several:
    sd = pooled_sd([_values(g, RECALL) for g in several])
    seeds = len(lab.scale.seeds)
    result["power"] = {
      **sd,
      "detectable_difference": detectable_difference(sd["sd"], seeds),
    }
  return result | _verdict(result)


def _pairs(ours, theirs, kind: str) -> tuple[list[float], list[float]]:
  pairs = matched(ours, theirs)
  return tuple(_values(side, kind) for side in zip(*pairs))


def _verdict(result: dict[str, Any]) -> dict[str, str]:
  gain = result["gain_over_experts"].get(MEMORY, {}).get(RECALL)
  power = result.get("power")
  if gain is None or gain["low"] is None or power is None:
    finding = "Fewer than two seeds of each side: no interval."
    return {"verdict": "too weak to tell", "finding": finding}
  finding = (
    f"The memory answers {_points(gain)} more of the one-hop questions than as "
    "many parameters in experts"
  )
  one_row = result["gain_over_experts"].get(ONE_ROW, {}).get(RECALL)
  if one_row is not None:
    finding += f"; a memory of one row per head {_points(one_row)}"
  finding += "."
  if gain["low"] > 0:
    return {"verdict": "reproduced", "finding": finding}
  if gain["high"] < 0:
    return {"verdict": "contradicted", "finding": finding}
  weak = power["detectable_difference"] > PAPERS_EFFECT
  return {
    "verdict": "too weak to tell" if weak else "not seen",
    "finding": finding,
  }


def _points(interval: dict[str, Any]) -> str:
  low, high = (100 * interval[name] for name in ("low", "high"))
  return f"{100 * interval['mean']:+.1f} points ({low:+.1f} to {high:+.1f})"


def draw(result: dict[str, Any], path: pathlib.Path) -> None:
  """Recall over frequency and over rows, and the questions of two hops."""
  points = {p["group"]: p for p in result["points"]}
  named = [g for g in (EXPERTS, MEMORY, ONE_ROW) if g in points]

  panels: list[Lines | Bars] = [
    Lines(
      {
        g: [
          (int(f), in_percent(x)) for f, x in points[g]["by_frequency"].items()
        ]
        for g in named
      },
      title="Recall of facts of one hop",
      xlabel="how often the text states the fact",
      ylabel="right answers (%)",
      log_x=True,
    )
  ]
  swept = [p for g, p in points.items() if g not in (EXPERTS, ONE_ROW)]
  if len(swept) > 1:
    frequencies = swept[0]["by_frequency"]
    panels.append(
      Lines(
        {
          f"said {f} times": [
            (p["rows"], in_percent(p["by_frequency"][f])) for p in swept
          ]
          for f in frequencies
        },
        title="Recall by rows, the backbone fixed",
        xlabel="rows per head",
        ylabel="right answers (%)",
        log_x=True,
      )
    )
  panels.append(
    Bars(
      {
        f"{g}: {kind.removeprefix('two hops, ')}": in_percent(
          points[g]["accuracy"][kind]
        )
        for kind in ("two hops, stated", "two hops, composed")
        for g in named
      },
      title="Facts of two hops",
      xlabel="right answers (%)",
    )
  )
  title = "What is known, at equal parameters (bars: 95 % over seeds)"
  draw_panels(panels, path, title=title)


# Two of the groups are edited and grown in `knowledge_editing`.
STUDY = Study("knowledge", runs, measure, analyze, draw, keep=True)

if __name__ == "__main__":
  STUDY.main()
