"""What the mechanism's report concludes from records that are made up."""

import types

import numpy as np
import pytest

from experiments.lab.labelled_text import BANDS
from experiments.lab.mechanism_picture import draw
from experiments.lab.mechanism_report import PAPERS, analyze

SEEDS, LAYERS, TOKENS, WIDTH = 3, 4, 600, 6


def record(lab, model, seed, *, lens, states, kept=0.9, stored=1.0):
  """One model's; `kept` of what was read, `stored` nats lost of facts."""
  with_memory = model == "memory"
  path = lab.folder / "states" / f"{model}{seed}.npy"
  np.save(path, states)
  groups = {"new": 0.0, "read": 0.1, "stored": stored, "both": stored}
  noise = 0.01 * seed
  modes = ("on", "off", "shuffled") if with_memory else ("on",)
  loss, correct = {}, {}
  for mode in modes:
    lost = (mode != "on") + 0.5 * (not with_memory)
    loss[mode] = {k: 3 + lost * v + noise for k, v in groups.items()}
    share = {"read": kept, "stored": 0.4}
    correct[mode] = {
      k: 0.5 * (share.get(k, 1.0) if mode == "off" else 1.0) for k in groups
    }
  found = {"share": dict.fromkeys(groups, 0.25), "loss": loss}
  found["correct"] = correct
  gates = {"0": 0.2, "256+": 0.8}
  return {
    "group": f"{model} 1000",
    "labels": {"model": model, "tokens": 1000},
    "seed": seed,
    "loss": {mode: 3.0 for mode in modes},
    "lens": {"on": [x + noise for x in lens] + [0.0]},
    "depth": {"on": 2.0 + noise},
    "groups": {
      name: found if name in ("all", "origin", "class") else _as_bands(found)
      for name in ("all", "origin", "class", "bigram", "trigram")
    },
    "gates": dict.fromkeys(("class", "bigram", "trigram", "word"), gates)
    if with_memory
    else {},
    "states": path.name,
  }


def _as_bands(tree):
  """The same numbers of groups by frequency."""
  names = dict(zip(("new", "read", "stored", "both"), BANDS))
  if not isinstance(tree, dict):
    return tree
  return {names.get(k, k): _as_bands(v) for k, v in tree.items()}


@pytest.fixture
def lab(tmp_path):
  (tmp_path / "states").mkdir()
  return types.SimpleNamespace(
    scale=types.SimpleNamespace(tokens=(1000, 2000)), folder=tmp_path
  )


def records(lab, *, lens_memory, ahead=0, **options):
  """Layers drift from one representation to another; `ahead` blocks sooner."""
  rng = np.random.default_rng(0)
  first, last = rng.normal(size=(2, TOKENS, WIDTH))
  found = []
  for seed in range(SEEDS):
    for model in ("experts", "memory"):
      lead = ahead if model == "memory" else 0
      # Layer by layer in longer steps, so that no two others are as close.
      places = np.clip((np.arange(LAYERS + 1) - 1 + lead) / 3, 0, 1) ** 1.4
      angle = places[:, None, None] * np.pi / 2
      states = np.cos(angle) * first + np.sin(angle) * last
      states += 0.3 * rng.normal(size=states.shape)
      lens = lens_memory if model == "memory" else [4.0, 3.0, 2.0, 1.0]
      found.append(
        record(lab, model, seed, lens=lens, states=states, **options)
      )
  return found


def test_what_the_paper_found_is_reproduced(lab, tmp_path):
  found = analyze(lab, records(lab, lens_memory=[4.0, 2.0, 1, 0.5], ahead=2))
  assert found["verdict"] == "reproduced"
  assert set(found["questions"]) == {*PAPERS, "frequency"}
  (length,) = found["lengths"]
  assert length["tokens"] == 1000
  np.testing.assert_allclose(
    length["lens_mean"]["difference"]["mean"], -2.5 / 3
  )
  origin = length["silenced"]["origin"]
  np.testing.assert_allclose(origin["depends"]["stored"]["mean"], 1)
  np.testing.assert_allclose(origin["misled"]["read"]["mean"], 0.1)
  np.testing.assert_allclose(origin["adds"]["stored"]["mean"], 0.5)
  np.testing.assert_allclose(origin["kept"]["stored"]["mean"], 0.4)
  np.testing.assert_allclose(origin["facts_less_reading"]["mean"], 0.9)
  favour = length["gates"]["frequent_less_rare"]
  np.testing.assert_allclose(favour["mean"], 0.6)
  # The first layers are ahead; the last have nowhere to go.
  places = [
    [p["mean"] for p in length["alignment"][side]["places"]]
    for side in ("memory", "experts")
  ]
  assert places[0][0] > places[1][0] + 0.3
  draw(found, tmp_path / "picture.png")
  assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_the_opposite_contradicts_it(lab):
  found = analyze(lab, records(lab, lens_memory=[4.0, 4.0, 3, 2], stored=-1.0))
  questions = found["questions"]
  assert questions["lens"]["verdict"] == "contradicted"
  assert questions["silencing"]["verdict"] == "contradicted"
  assert abs(questions["alignment"]["interval"]["mean"]) < 0.1
  assert found["verdict"] == "contradicted"


def test_one_seed_is_too_weak_and_draws(lab, tmp_path):
  one = records(lab, lens_memory=[4.0, 2.0, 1, 0.5])[:2]
  found = analyze(lab, one)
  assert found["verdict"] == "too weak to tell"
  assert found["lengths"][0]["alignment"] is None
  draw(found, tmp_path / "picture.png")
  assert (tmp_path / "picture.png").exists()


def test_states_that_lie_elsewhere_are_no_error(lab):
  found = records(lab, lens_memory=[4.0, 2.0, 1, 0.5])
  for path in (lab.folder / "states").iterdir():
    path.unlink()
  assert analyze(lab, found)["lengths"][0]["alignment"] is None
  assert analyze(lab, [])["verdict"] == "too weak to tell"
