"""The picture of `mechanism.py`, of the longest length that it has."""

import pathlib
from typing import Any

from experiments.lab.figures import Bars, Lines, draw_panels
from experiments.lab.labelled_text import BANDS


def draw(result: dict[str, Any], path: pathlib.Path) -> None:
  """Lens by depth, alignment, silencing by origin, and by frequency."""
  if not result["lengths"]:
    return
  last = result["lengths"][-1]
  names = {"memory": "with memory", "experts": "experts alone"}
  panels = [
    Lines(
      {
        names[side]: [(i, d[side]) for i, d in enumerate(last["lens"])]
        for side in names
      },
      title="How far each depth is from the output",
      xlabel="depth (blocks; 0 is the embedding)",
      ticks=[str(i) for i in range(len(last["lens"]))],
      ylabel="KL of the lens (nats)",
    )
  ]
  if last["alignment"]:
    places = {
      names[side]: [*enumerate(last["alignment"][side]["places"])]
      for side in names
    }
    panels.append(
      Lines(
        places,
        title="The layer of a model without memory\nthat each layer resembles",
        xlabel="layer j",
        ylabel="soft alignment a_j (layer)",
        ticks=[str(i) for i in range(1, len(last["lens"]))],
      )
    )
  origin, bands = last["silenced"]["origin"], last["silenced"]["trigram"]
  said = {
    "new": "in neither",
    "read": "in the window (reading)",
    "stored": "in training (facts)",
    "both": "in both",
  }
  panels.append(
    Bars(
      {
        f"{said[group]}, {origin['share'][group]['mean']:.0%}: {how}": origin[
          key
        ][group]
        for group in said
        for key, how in (("depends", "silenced"), ("adds", "experts alone"))
        if group in origin[key]
      },
      title="By where the target's trigram was met",
      xlabel="loss above that with memory (nats)",
    )
  )
  panels.append(
    Lines(
      {
        how: [
          (i, bands[key][band])
          for i, band in enumerate(BANDS)
          if band in bands[key]
        ]
        for key, how in (
          ("depends", "silenced"),
          ("misled", "wrong rows"),
          ("adds", "experts alone"),
        )
      },
      title="By frequency of the trigram that addresses it",
      xlabel="times in the training text",
      ticks=BANDS,
      ylabel="loss above that with memory (nats)",
      zero=True,
    )
  )
  draw_panels(
    panels,
    path,
    title="What a memory does, after "
    f"{last['tokens'] / 1e6:g} million tokens (bars: 95 % over seeds)",
  )
