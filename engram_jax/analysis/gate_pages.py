"""The figure behind `plots.plot_gates`: pages of text, coloured by token.

Lengths are in points. Text is set in a font of one width, so that columns are
columns; every token stands on a box in the colour of its gate.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from engram_jax.analysis.agg import (
  Axes,
  Figure,
  Normalize,
  PolyCollection,
  ScalarMappable,
  font_manager,
  matplotlib,
)
from engram_jax.analysis.text_layout import NEWLINE_MARK, TextLayout
from engram_jax.errors import require

# DejaVu Sans Mono comes with matplotlib.
_FONT, _FONT_SIZE = "DejaVu Sans Mono", 8.0
_ADVANCE = 0.60205 * _FONT_SIZE  # of every glyph of that font
_LINE = 1.5 * _FONT_SIZE
_MARGIN, _PANEL_TITLE, _HEADER, _GUTTER = 16.0, 18.0, 60.0, 26.0
_BAR = 180.0  # length of the colour bar
_MIN_WIDTH, _MIN_PANEL = 340.0, 210.0  # room for the colour bar, the titles
_TITLE_SIZE = 12.0
_INK, _FAINT = "#1a1a1a", "#8a8a8a"
_COLORMAP = "YlGnBu"  # its lightness falls steadily: greyscale keeps the order
_MAX_PIXELS = 2**16 - 1  # of Agg, on a side


def gate_pages(
  layout: TextLayout,
  panels: Sequence[tuple[str, Float[np.ndarray, "L"]]],
  *,
  title: str,
  limits: tuple[float, float],
  dpi: int,
  label: str,
) -> Figure:
  """One page per panel, two in a row, under a title and a colour bar.

  Args:
    layout: places of the L tokens, on one or more lines.
    panels: a name and the gates [L] of each.
    title: over the figure.
    limits: gates of the lightest and the darkest colour, ascending.
    dpi: pixels per inch.
    label: label of the colour bar.

  Raises:
    InputError: more lines than one picture holds.
  """
  across = min(2, len(panels))
  down = math.ceil(len(panels) / across)
  text_width = (layout.columns + 1) * _ADVANCE
  text_height = len(layout.numbers) * _LINE
  panel_width = max(_GUTTER + text_width, _MIN_PANEL)
  # 0.65 em is more than the mean letter takes.
  width = max(
    across * (panel_width + _MARGIN) + _MARGIN,
    0.65 * _TITLE_SIZE * len(title) + 2 * _MARGIN,
    _MIN_WIDTH,
  )
  panel_height = _PANEL_TITLE + text_height + _MARGIN
  height = _MARGIN + _HEADER + down * panel_height
  room = (_MAX_PIXELS * 72 / dpi - _MARGIN - _HEADER) / down
  most = int((room - _PANEL_TITLE - _MARGIN) / _LINE)
  lines, valid = len(layout.numbers), f"at most {most} in one picture"
  require(lines <= most, "tokens", f"{lines} lines of text", valid)

  figure = Figure(figsize=(width / 72, height / 72), dpi=dpi, facecolor="white")

  def place(x, y, w, h) -> Axes:  # from the top left
    box = (x / width, 1 - (y + h) / height, w / width, h / height)
    return figure.add_axes(box)

  def caption(x, y, text, **style):
    options = {"color": _INK, "parse_math": False, **style}
    figure.text(x / width, 1 - y / height, text, **options)

  caption(_MARGIN, _MARGIN, title, fontsize=_TITLE_SIZE, va="top")
  colors = ScalarMappable(Normalize(*limits), matplotlib.colormaps[_COLORMAP])
  bar = place(_MARGIN, _MARGIN + 24, _BAR, 9)
  ticks = np.linspace(*limits, 5)
  bar_axis = figure.colorbar(colors, cax=bar, orientation="horizontal")
  # As many decimals as tell two ticks apart.
  decimals = max(2, math.ceil(1 - math.log10(limits[1] - limits[0])))
  bar_axis.set_ticks(ticks, labels=[f"{x:.{min(decimals, 4)}f}" for x in ticks])
  bar_axis.outline.set_linewidth(0.6)
  bar.tick_params(labelsize=8, length=2, pad=2)
  caption(_MARGIN + _BAR + 12, _MARGIN + 28.5, label, fontsize=8, va="center")

  for i, (name, values) in enumerate(panels):
    x = _MARGIN + (i % across) * (panel_width + _MARGIN) + _GUTTER
    y = _MARGIN + _HEADER + (i // across) * panel_height
    name = f"{name}   mean {values.mean():.3f}"
    caption(x, y + _PANEL_TITLE - 6, name, fontsize=9.5, fontweight="bold")
    axes = place(x, y + _PANEL_TITLE, text_width, text_height)
    axes.set(xlim=(0, layout.columns + 1), ylim=(len(layout.numbers), 0))
    _draw_page(axes, layout, colors.to_rgba(values))
  return figure


def _draw_page(
  axes: Axes, layout: TextLayout, colors: Float[np.ndarray, "L 4"]
) -> None:
  """Draws the tokens, one unit a column and a line, with line numbers."""
  axes.set_axis_off()
  drawable = font_manager.get_font(font_manager.findfont(_FONT)).get_charmap()
  font = {"family": _FONT, "fontsize": _FONT_SIZE}
  verbatim = {"parse_math": False, "usetex": False}

  def write(column, line, text, **style):
    if text.strip():
      axes.text(column, line + 0.7, text, **font, **verbatim, **style)

  corners = []
  for box in layout.boxes:
    left, right = box.column, box.column + len(box.text)
    top, bottom = box.line + 0.04, box.line + 0.96
    corners.append([(left, top), (right, top), (right, bottom), (left, bottom)])
    # Rec. 709 weights, on the encoded values: good enough to choose the ink.
    dark = colors[box.token][:3] @ (0.2126, 0.7152, 0.0722) < 0.5
    ink = "white" if dark else _INK
    # Agg would warn of each glyph the font lacks.
    glyphs = [c if ord(c) in drawable else "\ufffd" for c in box.text]
    text = [" " if c == NEWLINE_MARK else c for c in glyphs]
    marks = [c if c == NEWLINE_MARK else " " for c in glyphs]
    write(left, box.line, "".join(text), color=ink)
    write(left, box.line, "".join(marks), color=ink, alpha=0.6)
  faces = colors[[box.token for box in layout.boxes]]
  # White edges keep neighbours of one colour apart.
  axes.add_collection(
    PolyCollection(
      corners, facecolors=faces, edgecolors="white", linewidths=0.9
    )
  )
  for line, number in enumerate(layout.numbers):
    text = "" if number is None else str(number)
    write(-0.8, line, text, color=_FAINT, ha="right")
