"""Pictures of the studies: lines and bars with their intervals, labelled."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engram_jax.analysis.agg import Axes, Figure
from engram_jax.analysis.plots import COLORS, DPI, MARKERS, save_figure
from engram_jax.errors import require


@dataclasses.dataclass(frozen=True)
class Lines:
  """A panel of lines over a number, each named at its end.

  Attributes:
    lines: by name, pairs of x and an interval as `mean_interval` returns it.
    title: title of the panel.
    xlabel: with its unit.
    ylabel: with its unit.
    log_x: logarithmic x axis.
    zero: draw the line y = 0, where there is no difference.
    ticks: what stands at x = 0, 1, ...; none for numbers.
  """

  lines: Mapping[str, Sequence[tuple[float, Mapping[str, Any]]]]
  title: str
  xlabel: str
  ylabel: str
  log_x: bool = False
  zero: bool = False
  ticks: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Bars:
  """A panel of horizontal points, one a name, with their intervals.

  Attributes:
    values: intervals as `mean_interval` returns them, by name.
    title: title of the panel.
    xlabel: with its unit.
    zero: draw the line x = 0, where there is no difference.
  """

  values: Mapping[str, Mapping[str, Any]]
  title: str
  xlabel: str
  zero: bool = True


def draw_panels(
  panels: Sequence[Lines | Bars], path: pathlib.Path, *, title: str
) -> None:
  """One picture of a study.

  Args:
    panels: from left to right, four at most.
    path: a .png file to write.
    title: over all of it, with what the bars are if they are not the 95 %
      interval over seeds.
  """
  require(1 <= len(panels) <= 4, "panels", len(panels), "1 to 4")
  rows = max((len(p.values) for p in panels if isinstance(p, Bars)), default=0)
  size = (1.5 + 5.2 * len(panels), max(4.6, 1.4 + 0.34 * rows))
  figure = Figure(figsize=size, dpi=DPI, layout="constrained")
  figure.suptitle(title, fontsize=13)
  for i, panel in enumerate(panels):
    axes = figure.add_subplot(1, len(panels), i + 1)
    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel(panel.xlabel, fontsize=10)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    (_draw_lines if isinstance(panel, Lines) else _draw_bars)(axes, panel)
  save_figure(figure, path)


def _errors(intervals: Sequence[Mapping[str, Any]]) -> np.ndarray:
  """Lengths of the bars below and above the means, [2, n]."""
  pairs = [
    (0.0, 0.0)
    if x.get("low") is None
    else (x["mean"] - x["low"], x["high"] - x["mean"])
    for x in intervals
  ]
  return np.clip(np.array(pairs).T, 0, None)


def _draw_lines(axes: Axes, panel: Lines) -> None:
  axes.set_ylabel(panel.ylabel, fontsize=10)
  if panel.log_x:
    axes.set_xscale("log")
  if panel.ticks:
    axes.set_xticks(range(len(panel.ticks)), panel.ticks)
  if panel.zero:
    axes.axhline(0, color="0.5", linewidth=0.8)
  ends = []
  for i, (name, points) in enumerate(panel.lines.items()):
    points = sorted(points, key=lambda p: p[0])
    x, intervals = [p[0] for p in points], [p[1] for p in points]
    if panel.log_x:  # beside each other, where they would cover each other
      x = [place * 1.02 ** (i - len(panel.lines) / 2) for place in x]
    means = [interval["mean"] for interval in intervals]
    color = COLORS[i % len(COLORS)]
    axes.errorbar(
      x,
      means,
      yerr=_errors(intervals),
      color=color,
      marker=MARKERS[i % len(MARKERS)],
      markersize=4.5,
      linewidth=1.4,
      capsize=2.5,
    )
    ends.append((means[-1], x[-1], name, color))
  _label_ends(axes, ends)


def _label_ends(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
  """Each line's name at its end, moved up where it would cover another."""
  # Room for the names inside: outside, the layout would narrow the panel.
  left, right = axes.get_xlim()
  if axes.get_xscale() == "log":
    left, right = left / 1.3, right * (right / left) ** 0.35 * 1.3
  else:
    right += 0.35 * (right - left)
  axes.set_xlim(left, right)
  low, high = axes.get_ylim()
  gap, last = (high - low) * 0.055, -np.inf
  for y, x, name, color in sorted(ends):
    place = max(y, last + gap)
    last = place
    label = axes.annotate(
      name,
      (x, place),
      xytext=(7, 0),
      textcoords="offset points",
      color=color,
      fontsize=9,
      va="center",
    )
    label.set_in_layout(False)


def _draw_bars(axes: Axes, panel: Bars) -> None:
  names = [*panel.values]
  intervals = [panel.values[name] for name in names]
  if panel.zero:
    axes.axvline(0, color="0.5", linewidth=0.8)
  axes.errorbar(
    [interval["mean"] for interval in intervals],
    range(len(names)),
    xerr=_errors(intervals),
    fmt="o",
    color=COLORS[0],
    markersize=5,
    capsize=3,
  )
  axes.set_yticks(range(len(names)), names, fontsize=9)
  axes.invert_yaxis()
