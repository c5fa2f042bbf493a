"""What does the memory do to the layers, and which predictions live on it?

The paper (§5) finds that a model with a memory is nearer to its own output at
early depths (LogitLens), that its layers resemble later ones of a model without
(CKA, soft alignment a_j > j), that it loses facts when the memory is silenced
and keeps reading, and that gates open at the ends of names. Engram-Nine (arXiv
2601.16531) finds that gates keep favouring frequent n-grams. Asked here, of
code, at several lengths, with what the paper lacks:

  another seed   a_j - j also between two models *without* a memory
  plain model    what a memory adds (its rival's loss less its own) beside what
                 depends on it (the loss without it less that with it)
  shuffled rows  silenced, and fed the rows of other positions

"Facts": the target's trigram is in the training text, not in the window.
"Reading": it stands earlier in the window and is not in the training text.

  python -m experiments.lab.mechanism --scale=cpu
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from engram_jax.analysis.effective_depth import mean_depth
from engram_jax.analysis.hidden_states import hidden_states
from engram_jax.analysis.logit_lens import lens_divergences
from engram_jax.analysis.silencing import (
  TokenScores,
  mean_by_group,
  rows_by_mode,
  scores_by_mode,
)
from engram_jax.files import whole_file
from experiments.lab.labelled_text import LabelledText, label_text
from experiments.lab.mechanism_picture import draw
from experiments.lab.mechanism_report import analyze
from experiments.lab.runs import Laboratory, Run, Trained
from experiments.lab.study import Study, tuned_learning_rate

#: Tokens at which two models are compared, at most.
COMPARED_TOKENS = 2048


def runs(lab: Laboratory) -> list[Run]:
  """Experts alone and with a memory, at equal parameters; short runs first."""
  scale, rate = lab.scale, tuned_learning_rate(lab)
  models = {"experts": scale.model, "memory": scale.with_memory()}
  return [
    Run(
      f"{name} {tokens}",
      lab.config(model, tokens=tokens, seed=seed, learning_rate=rate),
      {"model": name, "tokens": tokens},
    )
    for tokens, seed, (name, model) in itertools.product(
      scale.tokens, scale.seeds, models.items()
    )
  ]


def measure(lab: Laboratory, trained: Trained) -> dict[str, Any]:
  """All of one model; the states that pairs are compared by go to a file."""
  text = label_text(
    trained.data, trained.config.train, count=lab.scale.eval_windows
  )
  model, memory, tables = trained.model, trained.memory, trained.tables
  scores = scores_by_mode(model, memory, tables, text.batches)
  lens, states = {}, None
  for mode in ("on", "off") if memory else ("on",):
    lens[mode], found = _depths(trained, text, mode)
    states = found if states is None else states
  path = lab.folder / "states" / f"{trained.run.digest}.npy"
  path.parent.mkdir(parents=True, exist_ok=True)
  with whole_file(path) as file:
    np.save(file, states)
  groups = {
    "class": text.target_class,
    "origin": text.origin,
    "bigram": text.bands[2],
    "trigram": text.bands[3],
    "all": np.full(len(text.origin), "all"),
  }
  return {
    "loss": {mode: float(s.loss.mean()) for mode, s in scores.items()},
    "lens": lens,
    "depth": {mode: mean_depth(np.array(d)) for mode, d in lens.items()},
    "groups": {
      name: _of_groups(scores, group) for name, group in groups.items()
    },
    # Of the token that predicts: it is what opens the gate.
    "gates": _gates(scores["on"], text),
    "states": path.name,
  }


def _depths(
  trained: Trained, text: LabelledText, mode: str
) -> tuple[list[float], np.ndarray]:
  """Mean lens divergence by depth; states [depths, n, D] at ends of words."""
  divergences, states = [], []
  for batch in text.batches:
    keep, batch = batch["loss_mask"], jax.tree.map(jnp.asarray, batch)
    rows = None
    if trained.memory is not None:
      rows = rows_by_mode(trained.memory, trained.tables, batch, mode=mode)
    found = jax.device_get(_look(trained.model, rows, batch))
    state, divergence = (x[:, keep] for x in found)
    states.append(state.astype(np.float32))
    divergences.append(divergence)
  mean = np.concatenate(divergences, axis=1).mean(axis=1, dtype=np.float64)
  ends = np.flatnonzero(text.ends_word)
  step = max(len(ends) // COMPARED_TOKENS, 1)
  chosen = ends[::step][:COMPARED_TOKENS]
  return mean.tolist(), np.concatenate(states, axis=1)[:, chosen]


@nnx.jit
def _look(model, rows, batch):
  """Hidden states [depths, B, L, D] and lens divergences [depths, B, L]."""
  inputs, breaks = batch["inputs"], batch["breaks"]
  states = hidden_states(model, rows, inputs, breaks=breaks)
  return states, lens_divergences(model, states)


def _of_groups(
  scores: dict[str, TokenScores], groups: np.ndarray
) -> dict[str, Any]:
  """Share of each group; loss and accuracy by mode and group."""
  names, counts = np.unique(groups, return_counts=True)
  return {
    "share": {str(n): c / len(groups) for n, c in zip(names, counts)},
    "loss": {m: mean_by_group(s.loss, groups) for m, s in scores.items()},
    "correct": {m: mean_by_group(s.correct, groups) for m, s in scores.items()},
  }


def _gates(scores: TokenScores, text: LabelledText) -> dict[str, Any]:
  """Mean gate over layers and streams, by what the predicting token is."""
  if not scores.gates:
    return {}
  gates = np.concatenate([*scores.gates.values()], axis=-1).mean(axis=-1)
  ends = np.where(text.ends_word, "end of a word", "elsewhere")
  return {
    "class": mean_by_group(gates, text.input_class),
    "bigram": mean_by_group(gates, text.bands[2]),
    "trigram": mean_by_group(gates, text.bands[3]),
    "word": mean_by_group(gates, ends),
  }


STUDY = Study("mechanism", runs, measure, analyze, draw)

if __name__ == "__main__":
  STUDY.main()
