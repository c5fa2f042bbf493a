"""Draws the README's picture: how tokens become an update of hidden states.

  python docs/figures/overview.py

It writes overview.svg and overview.png beside this file. In the SVG text is
outlines, so that the picture looks the same wherever it is shown.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

WIDTH, HEIGHT = 10.2, 5.75
INK, MUTED, PAPER = "#1b2530", "#5a6775", "#ffffff"
IDS, ROWS, MODEL, NEUTRAL = "#2563a8", "#a85a12", "#22734d", "#8b97a5"
FILLS = {IDS: "#eaf2fb", ROWS: "#fdf3e7", MODEL: "#e8f5ee", NEUTRAL: "#f5f7f9"}


def rectangle(
  axes: Axes,
  left: float,
  bottom: float,
  width: float,
  height: float,
  *,
  color: str,
  fill: str | None = None,
) -> None:
  """A rectangle with round corners.

  Args:
    axes: canvas, one unit an inch.
    left: x of the left edge.
    bottom: y of the lower edge.
    width: horizontal size.
    height: vertical size.
    color: colour of the edge.
    fill: colour inside; None is the tint of `color`.
  """
  style = "round,pad=0,rounding_size=0.08"
  axes.add_patch(
    FancyBboxPatch(
      (left, bottom),
      width,
      height,
      style,
      edgecolor=color,
      facecolor=fill or FILLS[color],
      linewidth=1.3,
    )
  )


def box(
  axes: Axes,
  x: float,
  y: float,
  width: float,
  title: str,
  detail: str,
  *,
  color: str,
  height: float = 0.92,
  fill: str | None = None,
) -> None:
  """A box around (x, y) with a bold title and smaller lines beneath it.

  Args:
    axes: canvas, one unit an inch.
    x: center of the box.
    y: center of the box.
    width: horizontal size.
    title: bold text.
    detail: one or two lines of smaller text.
    color: colour of edge and title.
    height: vertical size.
    fill: colour inside; None is the tint of `color`.
  """
  rectangle(
    axes, x - width / 2, y - height / 2, width, height, color=color, fill=fill
  )
  lines = detail.count("\n") + 1
  text = dict(ha="center", va="center")
  axes.text(
    x,
    y + 0.09 * lines,
    title,
    fontsize=11,
    fontweight="bold",
    color=color,
    **text,
  )
  axes.text(x, y - 0.13, detail, fontsize=8.8, color=INK, **text)


def arrow(
  axes: Axes, *points: tuple[float, float], color: str = INK, dashed=False
) -> None:
  """An arrow along straight lines.

  Args:
    axes: canvas, one unit an inch.
    *points: where it begins, its corners, and where its head is.
    color: colour of line and head.
    dashed: whether the line is dashed.
  """
  *corners, before, end = points
  line = dict(color=color, linewidth=1.4, linestyle="--" if dashed else "-")
  if corners:
    xs, ys = zip(*corners, before)
    axes.plot(xs, ys, solid_capstyle="butt", **line)
  head = dict(arrowstyle="-|>", mutation_scale=12, shrinkA=0, shrinkB=0)
  axes.add_patch(FancyArrowPatch(before, end, **head, **line))


def note(axes: Axes, x: float, y: float, text: str, **options) -> None:
  """Small grey text.

  Args:
    axes: canvas, one unit an inch.
    x: center of the text, unless `ha` says otherwise.
    y: its center.
    text: one or more lines.
    **options: further keyword arguments of `Axes.text`.
  """
  options = dict(ha="center", va="center", color=MUTED, fontsize=8.8) | options
  axes.text(x, y, text, linespacing=1.35, **options)


def draw_retrieval(axes: Axes) -> None:
  """Token ids to rows, and where rows may live."""
  y = 4.3
  heading = dict(ha="left", fontsize=10.5, color=INK)
  note(axes, 0.35, 5.02, "1  Retrieval: tokens alone say which rows", **heading)
  box(axes, 1.1, y, 1.5, "token ids", "[B, L]", color=IDS)
  box(axes, 3.3, y, 1.5, "canonical ids", "[B, L]", color=IDS)
  box(axes, 5.3, y, 1.3, "row ids", "[B, L, K]", color=IDS)
  arrow(axes, (1.85, y), (2.55, y))
  arrow(axes, (4.05, y), (4.65, y))
  arrow(axes, (5.95, y), (6.55, y))
  note(axes, 2.2, y - 0.62, "compression")
  note(axes, 4.35, y - 0.62, "n-gram hash")
  note(axes, 6.25, y + 0.16, "lookup")

  rectangle(axes, 6.55, 2.45, 3.3, 2.42, color=ROWS)
  title = dict(fontsize=11, fontweight="bold", color=ROWS)
  note(axes, 8.2, 4.65, "tables, one per Engram layer", **title)
  stores = (
    ("device", "memory of one\naccelerator"),
    ("sharded", "over all devices,\nby all_to_all"),
    ("host", "pinned, or read\nahead of the step"),
    ("file", "mapped, or read\nahead of the step"),
  )
  for i, (name, detail) in enumerate(stores):
    x, row = 7.4 + 1.6 * (i % 2), 3.98 - 0.97 * (i // 2)
    options = dict(color=ROWS, height=0.86, fill=PAPER)
    box(axes, x, row, 1.5, name, detail, **options)


def draw_fusion(axes: Axes) -> None:
  """Rows and a hidden state to the next hidden state."""
  y = 1.2
  rectangle(axes, 0.2, 0.18, WIDTH - 0.4, 1.9, color=NEUTRAL)
  heading = dict(ha="left", fontsize=10.5, color=INK)
  text = "2  Fusion: rows in, never the table"
  note(axes, 0.35, 1.87, text, **heading)

  rectangle(axes, 3.0, 2.62, 2.6, 0.52, color=ROWS)
  title = dict(fontsize=11, fontweight="bold", color=ROWS)
  note(axes, 3.85, 2.88, "rows", **title)
  note(axes, 4.75, 2.88, "[B, L, K, d]", color=INK)
  arrow(axes, (6.55, 2.98), (5.6, 2.98), color=ROWS)
  arrow(axes, (5.6, 2.76), (6.55, 2.76), color=ROWS, dashed=True)
  note(axes, 6.07, 2.57, "gradients")
  text = "Rows can be read before the\nmodel runs, from any store."
  note(axes, 0.35, 2.88, text, ha="left", fontstyle="italic", fontsize=9.2)

  width = 1.35
  box(axes, 1.05, y, width, "hidden state", "[B, L, G, D]", color=MODEL)
  box(
    axes,
    3.4,
    y,
    width,
    "gate",
    "does the key fit\nthe hidden state?",
    color=MODEL,
  )
  box(axes, 5.2, y, width, "value", "gate × value", color=MODEL)
  box(axes, 6.95, y, 1.25, "convolution", "causal, short", color=MODEL)
  box(axes, 9.15, y, width, "hidden state", "[B, L, G, D]", color=MODEL)
  arrow(axes, (3.4, 2.62), (3.4, y + 0.46), color=ROWS)
  arrow(axes, (5.2, 2.62), (5.2, y + 0.46), color=ROWS)
  note(axes, 3.62, 2.28, "key")
  note(axes, 5.48, 2.28, "value")
  arrow(axes, (1.725, y), (2.725, y))
  arrow(axes, (4.075, y), (4.525, y))
  arrow(axes, (5.875, y), (6.325, y))
  arrow(axes, (7.575, y), (7.87, y))
  axes.add_patch(Circle((8.03, y), 0.16, ec=MODEL, fc=PAPER, lw=1.4))
  note(axes, 8.03, y, "+", fontsize=14, color=MODEL, fontweight="bold")
  arrow(axes, (8.19, y), (8.475, y))
  arrow(axes, (1.05, y - 0.46), (1.05, 0.42), (8.03, 0.42), (8.03, y - 0.16))
  note(axes, 4.5, 0.55, "residual")


def main() -> None:
  """Writes both files."""
  # Equal input gives equal files.
  plt.rcParams["svg.hashsalt"] = "overview"
  figure = plt.figure(figsize=(WIDTH, HEIGHT), facecolor=PAPER)
  axes = figure.add_axes((0, 0, 1, 1))
  axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
  axes.axis("off")
  title = "From tokens to hidden states through a conditional memory"
  note(axes, WIDTH / 2, 5.43, title, fontsize=15, color=INK, fontweight="bold")
  draw_retrieval(axes)
  draw_fusion(axes)
  target = Path(__file__).with_suffix("")
  figure.savefig(f"{target}.svg", metadata={"Date": None})
  figure.savefig(f"{target}.png", dpi=160)


if __name__ == "__main__":
  main()
