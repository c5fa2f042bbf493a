"""Pictures of a run, as PNG files: loss, gates over text, sweeps over seeds.

Figures are drawn by Agg on their own canvas: pyplot, its global figures and the
user's backend are never touched. A file appears whole or not at all.
"""

import io
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from engram_jax.analysis.agg import Axes, Figure, FigureCanvasAgg
from engram_jax.analysis.gate_pages import gate_pages
from engram_jax.analysis.text_layout import layout_tokens
from engram_jax.errors import require
from engram_jax.files import whole_file

DPI = 150
#: Width and height of the plots with two axes, in inches.
SIZE = (7.0, 4.4)
# Okabe and Ito's colours, which colour-blind readers can tell apart; markers
# and dashes tell the lines apart in greyscale.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", "-.", ":")


def smooth(
  values: Float[np.ndarray, "n"], *, reach: int
) -> Float[np.ndarray, "n"]:
  """Each value's place on the line fitted to its neighbours.

  A moving average lags behind a falling loss, or bends at its ends; a local
  line does neither.

  Args:
    values: [n], evenly spaced; entries that are not finite are left out.
    reach: neighbours on each side, fewer at the ends; 0 smooths nothing.

  Returns:
    [n]; NaN where no neighbour is finite.

  Raises:
    InputError: a negative reach.
  """
  require(reach >= 0, "reach", reach, "an integer >= 0")
  index = np.arange(len(values))
  first = np.maximum(index - reach, 0)
  end = np.minimum(index + reach + 1, len(values))
  finite = np.isfinite(values)
  y = np.where(finite, values, 0)
  t = index - len(values) / 2  # differences of squares lose fewer digits

  def total(x):  # over the neighbours that are finite
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, x, 0))])
    return sums[end] - sums[first]

  count = total(np.ones_like(t))
  with np.errstate(invalid="ignore", divide="ignore"):
    mean_t, mean_y = total(t) / count, total(y) / count
    spread = total(t * t) / count - mean_t**2
    slope = (total(t * y) / count - mean_t * mean_y) / spread
  # One neighbour makes no line.
  slope = np.where(count > 1, slope, 0)
  return mean_y + slope * (t - mean_t)


def plot_loss(
  records_train: Sequence[Mapping[str, Any]],
  records_eval: Sequence[Mapping[str, Any]],
  path: str | os.PathLike[str],
  *,
  title: str = "Training loss",
) -> None:
  """The loss by step: every record faint, a smooth line, the evaluations.

  Args:
    records_train: with `step` and `loss`, from `read_metrics`.
    records_eval: the same of the evaluations; may be empty.
    path: a .png file to write.
    title: over the picture.

  Raises:
    InputError: no training records, one without loss, or a path that cannot
      be written.
  """
  valid = "one or more records"
  require(len(records_train) > 0, "records_train", "none", valid)
  steps, losses = _curve("records_train", records_train)
  missing = _not_finite(losses)
  figure, axes = _figure(title, xlabel="step", ylabel="loss (nats per token)")
  # A twenty-fifth of the run: smooth, and still quick to turn.
  line = smooth(losses, reach=len(losses) // 50)
  axes.plot(steps, losses, color=COLORS[0], alpha=0.25, linewidth=0.8)
  last = line[np.isfinite(line)][-1:]
  axes.plot(
    steps,
    line,
    color=COLORS[0],
    linewidth=1.8,
    # One record makes no line.
    marker="o" if len(losses) == 1 else None,
    label="train, smoothed"
    + "".join(f" (last {x:.3f})" for x in last)
    + missing,
  )
  if records_eval:
    steps, losses = _curve("records_eval", records_eval)
    finite = losses[np.isfinite(losses)]
    found = f"last {losses[-1]:.3f}"
    found += f", lowest {np.min(finite):.3f}" if finite.size else ""
    axes.plot(
      steps,
      losses,
      color=COLORS[1],
      linewidth=1.0,
      linestyle="--",
      marker="o",
      markersize=4,
      label=f"validation ({found})" + _not_finite(losses),
    )
  axes.legend(frameon=False)
  save_figure(figure, path)


def plot_lines(
  lines: Mapping[str, tuple[Any, Any]],
  path: str | os.PathLike[str],
  *,
  title: str,
  xlabel: str,
  ylabel: str,
  log_x: bool = False,
  log_y: bool = False,
) -> None:
  """Lines of a sweep: the mean over seeds, bars from the least to the most.

  Args:
    lines: by name, x [n] and the values [n, seeds] (or [n] for one seed),
      arrays or what makes one.
    path: a .png file to write.
    title: over the picture.
    xlabel: with its unit.
    ylabel: with its unit.
    log_x: logarithmic x axis; every x must be above 0.
    log_y: the same for y.

  Raises:
    InputError: no lines, arrays that do not fit together, a value that is not
      finite or cannot be shown on a logarithmic axis.
  """
  require(len(lines) > 0, "lines", "none", "one or more lines")
  figure, axes = _figure(title, xlabel=xlabel, ylabel=ylabel)
  all_x: set[float] = set()
  for i, (name, (x, values)) in enumerate(lines.items()):
    x, values = np.asarray(x, float), np.asarray(values, float)
    values = values[:, None] if values.ndim == 1 else values
    fits = values.ndim == 2 and x.shape == values.shape[:1] and values.size
    shapes = f"x {x.shape}, values {values.shape}"
    require(fits, f"lines[{name!r}]", shapes, "x [n], values [n, seeds]")
    for axis, array, log in (("x", x, log_x), ("values", values, log_y)):
      shown = np.isfinite(array) & ((array > 0) | (not log))
      valid = "finite numbers" + " above 0" * log
      ok = shown.all()
      field = f"lines[{name!r}] {axis}"
      require(ok, field, None if ok else array[~shown][0], valid)
    order = np.argsort(x)
    x, values = x[order], values[order]
    mean = values.mean(1)
    bars = np.stack([mean - values.min(1), values.max(1) - mean])
    axes.errorbar(
      x,
      mean,
      yerr=bars.clip(min=0) if values.shape[1] > 1 else None,
      label=name,
      color=COLORS[i % len(COLORS)],
      marker=MARKERS[i % len(MARKERS)],
      linestyle=DASHES[i % len(DASHES)],
      markersize=5,
      linewidth=1.5,
      capsize=3,
    )
    all_x |= set(x.tolist())
  if log_x:
    axes.set_xscale("log")
  if log_y:
    axes.set_yscale("log")
  if len(all_x) <= 8 and not log_x:
    axes.set_xticks(sorted(all_x))
  axes.legend(frameon=False)
  save_figure(figure, path)


def plot_gates(
  tokens: Sequence[str],
  gates: Mapping[int, Shaped[np.ndarray, "..."]],
  path: str | os.PathLike[str],
  *,
  title: str = "How far each token opens the gate",
  label: str = "gate (1: all of the memory)",
  limits: tuple[float, float] | None = None,
  max_columns: int = 88,
) -> None:
  """Text on its gates: a page per layer and stream, a colour per token.

  Args:
    tokens: L pieces of text, from `gates.token_texts`; whitespace is laid out
      as it is (see `text_layout.py`).
    gates: per Engram layer [L, G], from `gates.gate_map`.
    path: a .png file to write.
    title: over the picture.
    label: label of the colour bar: other numbers than gates may be shown.
    limits: gates of the lightest and the darkest colour; None for the least
      and the largest gate in the picture.
    max_columns: longer lines are continued on the next.

  Raises:
    InputError: no text, gates of other shapes or not finite, limits that do
      not ascend, a text too long for one picture.
  """
  layout = layout_tokens(tokens, max_columns=max_columns)
  valid = "one or more tokens with text"
  require(layout.boxes, "tokens", f"{len(tokens)} without text", valid)
  require(len(gates) > 0, "gates", "none", "gates of one or more layers")
  panels = []
  for layer in sorted(gates):
    array = np.asarray(gates[layer], np.float32)
    fits = array.ndim == 2 and array.shape[0] == len(tokens) and array.size
    valid = f"[L = {len(tokens)}, G]"
    require(fits, f"gates[{layer}]", array.shape, valid)
    finite = np.isfinite(array).all()
    require(finite, f"gates[{layer}]", "not finite", "finite numbers")
    streams = array.shape[1]
    for stream in range(streams):
      name = f"layer {layer}" + f", stream {stream}" * (streams > 1)
      panels.append((name, array[:, stream]))
  if limits is None:
    # Only what is seen counts.
    seen = [box.token for box in layout.boxes]
    shown = np.stack([values[seen] for _, values in panels])
    limits = (float(shown.min()), float(shown.max()))
    limits = limits if limits[0] < limits[1] else (0.0, 1.0)
  require(limits[0] < limits[1], "limits", limits, "low < high")
  figure = gate_pages(
    layout, panels, title=title, limits=limits, dpi=DPI, label=label
  )
  save_figure(figure, path)


def _not_finite(losses: np.ndarray) -> str:
  """What the legend says of points that a line leaves out."""
  count = np.sum(~np.isfinite(losses))
  return f", {count} not finite and not shown" if count else ""


def _curve(
  field: str, records: Sequence[Mapping[str, Any]]
) -> tuple[np.ndarray, np.ndarray]:
  """Steps and losses of the records."""
  for i, record in enumerate(records):
    for name in ("step", "loss"):
      valid = f"a record with {name}"
      require(name in record, f"{field}[{i}]", dict(record), valid)
  steps = np.array([record["step"] for record in records])
  return steps, np.array([float(record["loss"]) for record in records])


def _figure(title: str, *, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
  figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
  axes = figure.add_subplot()
  axes.set_title(title, fontsize=12)
  axes.set_xlabel(xlabel, fontsize=10)
  axes.set_ylabel(ylabel, fontsize=10)
  axes.grid(alpha=0.25, linewidth=0.6)
  axes.spines[["top", "right"]].set_visible(False)
  return figure, axes


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
  """Renders the figure and puts the file in place.

  Args:
    figure: what is drawn.
    path: a .png file to write.

  Raises:
    InputError: a name that does not end in .png.
  """
  path = pathlib.Path(path)
  require(path.suffix == ".png", "path", path, "a file name that ends in .png")
  buffer = io.BytesIO()
  FigureCanvasAgg(figure).print_png(buffer)
  with whole_file(path) as file:
    file.write(buffer.getvalue())
