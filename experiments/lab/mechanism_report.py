"""What follows from the records of `mechanism.py`.

Every comparison is by seed: the two sides of a seed read the same text. Of two
models' layers, `cka` compares different seeds only, with a control of the same
kind: equal weights at the start would make any two models alike.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from engram_jax.analysis.cka import cka, hsic_sums, soft_alignment
from engram_jax.analysis.effective_depth import crossing_depth
from experiments.lab.labelled_text import BANDS
from experiments.lab.runs import Laboratory, by_group, matched
from experiments.lab.statistics import mean_interval

#: Tokens of one minibatch of `cka`.
CKA_BATCH = 256
#: Layers that count in the soft alignment: of 4 to 8 blocks, not the 5 that the
#: paper takes of 30.
ALIGNED = 2
#: Questions whose least favourable verdict is the study's.
PAPERS = ("lens", "alignment", "silencing")

Pairs = Sequence[tuple[dict[str, Any], dict[str, Any]]]


def analyze(lab: Laboratory, records: list[dict[str, Any]]) -> dict[str, Any]:
  """By length: lens, depth, alignment, silencing, frequency; the verdicts."""
  groups, lengths = by_group(records), []
  for tokens in lab.scale.tokens:
    pairs = matched(
      groups.get(f"memory {tokens}", []), groups.get(f"experts {tokens}", [])
    )
    if pairs:
      lengths.append({"tokens": tokens, **_of_length(lab, pairs)})
  if not lengths:
    return {
      "verdict": "too weak to tell",
      "finding": "No length has both models yet.",
      "lengths": [],
    }
  questions = _questions(lengths[-1])
  order = ("contradicted", "not seen", "too weak to tell", "reproduced")
  # The paper's own findings; "frequency" is Engram-Nine's.
  asked = [questions[name]["verdict"] for name in PAPERS]
  worst = min(asked, key=order.index)
  return {
    "verdict": worst,
    "finding": " ".join(q["finding"] for q in questions.values()),
    "questions": questions,
    "lengths": lengths,
  }


def _of_length(lab: Laboratory, pairs: Pairs) -> dict[str, Any]:
  plain = [p["lens"]["on"] for _, p in pairs]
  level = float(np.mean(plain, axis=0)[1]) / 2
  gates = [m["gates"] for m, _ in pairs]
  return {
    "loss": _sides(pairs, lambda r: r["loss"]["on"]),
    "lens": [
      _sides(pairs, lambda r, i=i: r["lens"]["on"][i])
      for i in range(len(plain[0]))
    ],
    "lens_mean": _sides(pairs, lambda r: float(np.mean(r["lens"]["on"][1:-1]))),
    "mean_depth": _sides(pairs, lambda r: r["depth"]["on"]),
    "crossing_depth": {
      "level": level,
      **_sides(pairs, lambda r: _crossing(r["lens"]["on"], level)),
    },
    "alignment": _alignment(lab, pairs),
    "silenced": {
      name: _silenced(pairs, name)
      for name in ("all", "origin", "class", "bigram", "trigram")
    },
    "gates": {
      "frequent_less_rare": _difference_of(
        [g["trigram"] for g in gates], *_ends([g["trigram"] for g in gates])
      ),
      **{
        name: _means([g[name] for g in gates])
        for name in ("class", "bigram", "trigram", "word")
      },
    },
  }


def _crossing(divergences, level):
  return crossing_depth(np.array(divergences), level=level)


def _sides(pairs: Pairs, value) -> dict[str, Any]:
  """A number with a memory, without one, and the difference by seed."""
  both = [(value(m), value(p)) for m, p in pairs]
  return {
    "memory": mean_interval([m for m, _ in both]),
    "experts": mean_interval([p for _, p in both]),
    "difference": mean_interval([m - p for m, p in both]),
  }


def _means(by_seed: Sequence[dict[str, float]]) -> dict[str, Any]:
  """The interval of each key that every seed has."""
  shared = set.intersection(*(set(x) for x in by_seed))
  names = [name for name in by_seed[0] if name in shared]
  return {n: mean_interval([x[n] for x in by_seed]) for n in names}


def _difference_of(
  by_seed: Sequence[dict[str, float]], one: str, other: str
) -> dict[str, Any] | None:
  """One group less another, seed by seed; None where a seed lacks one."""
  if not all(one in x and other in x for x in by_seed):
    return None
  return mean_interval([x[one] - x[other] for x in by_seed])


def _ends(by_seed: Sequence[dict[str, float]]) -> tuple[str, str]:
  """The most and the least frequent band that every seed has."""
  shared = [band for band in BANDS if all(band in x for x in by_seed)]
  return shared[-1], shared[0]


def _silenced(pairs: Pairs, name: str) -> dict[str, Any]:
  """By group: its share, what depends on the memory, what the memory adds.

  `depends`: loss without the memory less loss with it. `misled`: loss with the
  rows of other positions less that with its own. `adds`: loss of the model of
  experts less that of the one with a memory. `kept`: share of the right
  predictions that stay right in number without the memory.
  `facts_less_reading`: `depends` of the group "stored" less that of "read".
  """
  mine = [m["groups"][name] for m, _ in pairs]
  theirs = [p["groups"][name] for _, p in pairs]

  def less(ours, others):
    return [{k: a[k] - b[k] for k in a} for a, b in zip(ours, others)]

  on, off, wrong = (
    [m["loss"][mode] for m in mine] for mode in ("on", "off", "shuffled")
  )
  kept = [
    {
      k: m["correct"]["off"][k] / right
      for k, right in m["correct"]["on"].items()
      if right > 0
    }
    for m in mine
  ]
  return {
    "share": _means([m["share"] for m in mine]),
    "loss": _means(on),
    "depends": _means(less(off, on)),
    "facts_less_reading": _difference_of(less(off, on), "stored", "read"),
    "misled": _means(less(wrong, on)),
    "adds": _means(less([p["loss"]["on"] for p in theirs], on)),
    "kept": _means(kept),
  }


def _alignment(lab: Laboratory, pairs: Pairs) -> dict[str, Any] | None:
  """a_j of models with a memory, and of others without, by seed.

  None where the states are not on this machine, or there is but one seed.
  """
  folder = lab.folder / "states"
  paths = {r["states"]: folder / r["states"] for pair in pairs for r in pair}
  if len(pairs) < 2 or not all(path.exists() for path in paths.values()):
    return None
  # Without the embedding: layer 1 is the first block.
  states = {name: np.load(path)[1:] for name, path in paths.items()}

  def aligned(reference, model):
    x, y = states[reference["states"]], states[model["states"]]
    cuts = range(0, x.shape[1], CKA_BATCH)
    # A rest of less than 4 tokens is no minibatch.
    parts = [slice(i, i + CKA_BATCH) for i in cuts if x.shape[1] - i >= 4]
    return cka(hsic_sums((x[:, part], y[:, part]) for part in parts))

  found = {}
  for name, side in (("memory", 0), ("experts", 1)):
    similar = {}
    for i, j in itertools.permutations(range(len(pairs)), 2):
      similar.setdefault(j, []).append(aligned(pairs[i][1], pairs[j][side]))
    by_seed = [np.mean(parts, axis=0) for parts in similar.values()]
    places = np.array([soft_alignment(s, k=ALIGNED) for s in by_seed])
    layers = np.arange(1, places.shape[1] + 1)
    found[name] = {
      "cka": np.mean(by_seed, axis=0).tolist(),
      "places": [mean_interval(column) for column in places.T],
      "shift": (places - layers).mean(axis=1).tolist(),
    }
  shifts = [found[name]["shift"] for name in ("memory", "experts")]
  found["difference"] = mean_interval(np.subtract(*shifts))
  return found


def _verdict(interval: dict[str, Any] | None) -> str:
  """Whether a number that the paper finds above 0 is."""
  if interval is None or interval["low"] is None:
    return "too weak to tell"
  if interval["low"] > 0:
    return "reproduced"
  return "contradicted" if interval["high"] < 0 else "too weak to tell"


def _negative(interval: dict[str, Any]) -> dict[str, Any]:
  low, high = interval["high"], interval["low"]
  ends = (None, None) if low is None else (-low, -high)
  return {
    **interval,
    "mean": -interval["mean"],
    "low": ends[0],
    "high": ends[1],
  }


def _questions(last: dict[str, Any]) -> dict[str, Any]:
  """A verdict on each finding, at the longest length."""
  lens, depth = _negative(last["lens_mean"]["difference"]), last["mean_depth"]
  shift = last["alignment"] and last["alignment"]["difference"]
  origin, gates = last["silenced"]["origin"], last["gates"]["trigram"]
  kept, bands = origin["kept"], [band for band in BANDS if band in gates]
  favour = last["gates"]["frequent_less_rare"]
  found = {
    "lens": (
      lens,
      f"After {last['tokens'] / 1e6:g} million tokens the inner depths are "
      f"{lens['mean']:.3f} nats nearer to the output with a memory (mean depth "
      f"{depth['memory']['mean']:.2f} against {depth['experts']['mean']:.2f} "
      "blocks).",
    ),
    "alignment": (
      shift,
      f"Its layers resemble ones {shift['mean']:+.2f} deeper, against those of "
      "another seed without a memory."
      if shift
      else "Layers were not compared.",
    ),
    "silencing": (
      origin["facts_less_reading"],
      f"Silenced, it keeps {_percent(kept, 'stored')} of the right predictions "
      f"of what is in the training text alone, {_percent(kept, 'read')} of "
      "what is in the window alone.",
    ),
    "frequency": (
      favour,
      f"Gates are {gates[bands[-1]]['mean']:.2f} at trigrams met {bands[-1]} "
      f"times, {gates[bands[0]]['mean']:.2f} at those met {bands[0]} times.",
    ),
  }
  return {
    name: {"verdict": _verdict(x), "interval": x, "finding": sentence}
    for name, (x, sentence) in found.items()
  }


def _percent(values: dict[str, Any], name: str) -> str:
  return f"{values[name]['mean']:.0%}" if name in values else "-"
