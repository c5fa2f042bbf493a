"""Tests of the pictures: valid files of the right size, pyplot untouched."""

import os
import struct
import subprocess
import sys
import textwrap

import matplotlib
import numpy as np
import pytest
from matplotlib import image

from engram_jax.analysis import plots
from engram_jax.errors import InputError

TOKENS = ["def", " f", "(x", "):", "\n\t", "return", " x", " $a_$", "\n"]
WIDE, HIGH = (round(inches * plots.DPI) for inches in plots.SIZE)


def records(losses):
  return [{"step": i, "loss": loss} for i, loss in enumerate(losses)]


def read(path):
  """The pixels [height, width, 4] of a PNG file, decoded and checked."""
  assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
  return image.imread(path)


def png_size(path):
  return struct.unpack(">II", path.read_bytes()[16:24])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
  "train, evaluation",
  [
    (np.linspace(9, 3, 200), [5.0, 4.0]),
    ([3.0], []),
    ([3.0, float("nan"), float("inf"), 2.0], [float("nan")]),
    ([float("nan")] * 3, []),
  ],
)
def test_loss(tmp_path, train, evaluation):
  path = tmp_path / "loss.png"
  plots.plot_loss(records(train), records(evaluation), path)
  assert read(path).shape == (HIGH, WIDE, 4)
  assert png_size(path) == (WIDE, HIGH)
  assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("options", [{}, {"log_x": True, "log_y": True}])
def test_lines(tmp_path, options):
  path = tmp_path / "lines.png"
  lines = {
    "seeds": ([3, 1, 2], [[3.0, 3.1], [1.0, 1.1], [2.0, 2.1]]),
    "one": ([1, 2], [1.0, 2.0]),
  }
  plots.plot_lines(
    lines, path, title="title", xlabel="x (rows)", ylabel="y (ms)", **options
  )
  assert read(path).shape == (HIGH, WIDE, 4)


@pytest.mark.filterwarnings("error")
def test_a_gate_picture_has_a_page_per_layer_and_stream(tmp_path):
  path, gates = tmp_path / "gates.png", np.linspace(0, 1, 18).reshape(9, 2)
  sizes = []
  for of_layer in (
    {1: gates[:, :1]},
    {1: gates},
    {1: gates, 3: gates},
    {1: gates, 3: gates, 5: gates},
  ):
    plots.plot_gates(TOKENS, of_layer, path)
    height, width, _ = read(path).shape
    sizes.append((width, height))
  # Two in a row, the rows below each other.
  (one, first), (two, second), (same, third), (_, fourth) = sizes
  assert one < two == same
  assert first == second < third
  assert abs((fourth - third) - (third - second)) <= 1  # whole pixels


def test_each_token_stands_on_the_colour_of_its_gate(tmp_path):
  path = tmp_path / "gates.png"
  gates = np.array([[0.0], [0.25], [1.0]], np.float32)
  options = {"limits": (0.0, 1.0), "title": ""}
  plots.plot_gates(["aaa", "bbb", "ccc"], {0: gates}, path, **options)
  pixels = np.round(read(path) * 255).astype(int)
  page = pixels[pixels.shape[0] * 3 // 4 :]  # below the colour bar
  colormap = matplotlib.colormaps["YlGnBu"]

  def found(gate):  # Agg may round the other way
    distance = np.abs(page - np.array(colormap(gate, bytes=True), int)).max(-1)
    return (distance <= 1).sum() > 100

  assert [found(gate) for gate in (0.0, 0.25, 1.0)] == [True] * 3
  assert not found(0.6)


@pytest.mark.filterwarnings("error")
def test_text_that_a_font_or_tex_would_trip_over(tmp_path):
  tokens = ["$x_1", "$", "\\frac{", "漢字", "🎉", "\r\n", "\x00\x1b", "e\u0301"]
  tokens += ["\ud800", "", "   ", "\u21b5"]
  gates = {0: np.full((len(tokens), 1), 0.5)}  # all the same: any colour
  plots.plot_gates(tokens, gates, tmp_path / "gates.png", title="$\\bad{")
  read(tmp_path / "gates.png")


def test_other_numbers_than_gates_are_labelled_as_such(tmp_path):
  path, found = tmp_path / "gates.png", []
  for options in ({}, {"label": "nats"}):
    plots.plot_gates(["a", "b"], {0: np.eye(2)[:, :1]}, path, **options)
    found.append(path.read_bytes())
  assert found[0] != found[1]


def test_smooth_keeps_lines_and_leaves_out_what_is_not_finite():
  line = np.arange(20.0) * -0.5 + 3
  np.testing.assert_allclose(plots.smooth(line, reach=4), line)
  holes = line.copy()
  holes[[0, 7, 19]] = np.nan, np.inf, -np.inf
  np.testing.assert_allclose(plots.smooth(holes, reach=2), line)
  noise = np.random.default_rng(0).normal(size=400)
  assert plots.smooth(noise, reach=50).std() < 0.2
  np.testing.assert_allclose(plots.smooth(noise, reach=0), noise)
  alone = plots.smooth(np.array([np.nan, np.nan, 2.0]), reach=1)
  np.testing.assert_array_equal(alone, [np.nan, 2, 2])
  assert plots.smooth(np.zeros(0), reach=3).shape == (0,)


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
  path = tmp_path / "loss.png"
  path.write_bytes(b"before")

  def fail(*_):
    raise OSError("disk full")

  monkeypatch.setattr(plots.os, "replace", fail)
  with pytest.raises(OSError, match="disk full"):
    plots.plot_loss(records([1.0]), [], path)
  assert path.read_bytes() == b"before"
  assert list(tmp_path.iterdir()) == [path]


def test_pyplot_and_the_backend_are_left_alone(tmp_path):
  script = f"""
    import sys
    import matplotlib
    matplotlib.rcParams["backend"] = "svg"
    before = dict(matplotlib.rcParams)
    from engram_jax.analysis import plots
    folder = {str(tmp_path)!r}
    plots.plot_loss([{{"step": 1, "loss": 1.0}}], [], folder + "/l.png")
    gates = {{0: plots.np.ones((1, 1))}}
    plots.plot_gates(["a"], gates, folder + "/g.png")
    assert "matplotlib.pyplot" not in sys.modules
    assert dict(matplotlib.rcParams) == before
  """
  command = [sys.executable, "-c", textwrap.dedent(script)]
  subprocess.run(command, check=True)
  assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
  "train, match",
  [([], "records_train"), ([{"step": 1}], "loss"), ([{"loss": 1}], "step")],
)
def test_bad_records_are_refused(tmp_path, train, match):
  with pytest.raises(InputError, match=match):
    plots.plot_loss(train, [], tmp_path / "loss.png")


@pytest.mark.parametrize(
  "name, match", [("a.jpg", r"\.png"), ("none/a.png", "writable")]
)
def test_a_bad_path_is_refused(tmp_path, name, match):
  with pytest.raises(InputError, match=match):
    plots.plot_loss(records([1.0]), [], tmp_path / name)


@pytest.mark.parametrize(
  "lines, options, match",
  [
    ({}, {}, "lines"),
    ({"a": ([1, 2], [1.0])}, {}, "'a'"),
    ({"a": ([1], np.zeros((1, 0)))}, {}, "'a'"),
    ({"a": ([1], [np.nan])}, {}, "values: nan"),
    ({"a": ([0], [1.0])}, {"log_x": True}, "x: 0.0; valid: .*above 0"),
    ({"a": ([1], [-1.0])}, {"log_y": True}, "values: -1.0"),
  ],
)
def test_bad_lines_are_refused(tmp_path, lines, options, match):
  labels = {"title": "t", "xlabel": "x", "ylabel": "y"}
  with pytest.raises(InputError, match=match):
    plots.plot_lines(lines, tmp_path / "a.png", **labels, **options)


@pytest.mark.parametrize(
  "tokens, gates, options, match",
  [
    ([""], {0: np.ones((1, 1))}, {}, "tokens"),
    (["a"], {}, {}, "gates"),
    (["a"], {3: np.ones((2, 1))}, {}, r"gates\[3\]"),
    (["a"], {3: np.ones(1)}, {}, r"gates\[3\]"),
    (["a"], {3: np.ones((1, 0))}, {}, r"gates\[3\]"),
    (["a"], {3: np.full((1, 1), np.nan)}, {}, "finite"),
    (["a"], {0: np.ones((1, 1))}, {"limits": (1.0, 1.0)}, "limits"),
    (["\n" * 10_000], {0: np.ones((1, 1))}, {}, "10000 lines.*at most"),
  ],
)
def test_bad_gates_are_refused(tmp_path, tokens, gates, options, match):
  with pytest.raises(InputError, match=match):
    plots.plot_gates(tokens, gates, tmp_path / "a.png", **options)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "backend", ["module://matplotlib_inline.backend_inline", "garbage", "svg"]
)
def test_a_backend_of_the_parent_is_of_no_account(tmp_path, backend):
  script = f"""
    from engram_jax.analysis import plots
    path = {str(tmp_path / "l.png")!r}
    plots.plot_loss([{{"step": 1, "loss": 1.0}}], [], path)
    import matplotlib
    import os
    assert os.environ["MPLBACKEND"] == {backend!r}
    assert {backend!r} != "svg" or matplotlib.rcParams["backend"] == "svg"
  """
  # Neither a home nor a locale is needed.
  env = {k: v for k, v in os.environ.items() if k not in ("HOME", "LANG")}
  env |= {"MPLBACKEND": backend, "LC_ALL": "C", "PYTHONUTF8": "0"}
  command = [sys.executable, "-c", textwrap.dedent(script)]
  subprocess.run(command, check=True, env=env)
  assert (tmp_path / "l.png").exists()


def test_the_picture_says_how_many_losses_it_does_not_show(tmp_path):
  drawn = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      plots.FigureCanvasAgg, "print_png", lambda self, _: drawn.append(self)
    )
    losses = [3.0, float("nan"), float("inf"), 2.0]
    plots.plot_loss(records(losses), records([2.0, np.nan]), tmp_path / "a.png")
  (axes,) = drawn[0].figure.axes
  train, validation = [t.get_text() for t in axes.get_legend().get_texts()]
  assert "2 not finite and not shown" in train
  assert "1 not finite and not shown" in validation and "2.000" in validation
