"""Files of another run, and text that has changed: refused by the programs."""

import json
import pathlib
import shutil
import string

import pytest

from engram_jax.stores.row_files import RowFile
from engram_jax.training.runs import load_run

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(program, text_folder, tmp_path_factory):
  """Two runs of one config but for the text, and a third but for the seed."""
  folder = tmp_path_factory.mktemp("runs")
  text = folder / "text"
  shutil.copytree(text_folder, text)
  others = folder / "other text"
  others.mkdir()
  letters = string.ascii_lowercase
  rotated = str.maketrans(letters, letters[7:] + letters[:7])
  for path in text_folder.iterdir():
    # Other letters in the same places: a tokenizer of the same size.
    (others / path.name).write_text(path.read_text().translate(rotated))
  given = {
    "run": [f"--config.data.folder={text}"],
    "others": [f"--config.data.folder={others}"],
    "seed": [f"--config.data.folder={text}", "--config.train.seed=5"],
  }
  for name, options in given.items():
    options += ["--config.train.steps=8", "--config.train.eval_every=0"]
    done = program("pretrain", f"--workdir={folder / name}", *options)
    assert done.returncode == 0, done.stderr
  return folder


def refused(done, *words):
  """Whether a program ended in one line with these words in it."""
  assert done.returncode == 2, done.stderr
  assert "Traceback" not in done.stderr
  (line,) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
  for word in words:
    assert str(word) in line, line


@pytest.mark.parametrize(
  "name, field",
  [
    ("tokenizer.json", "tokenizer_digest"),
    ("compression.npz", "compression_digest"),
  ],
)
def test_another_runs_file_is_refused_wherever_it_is_loaded(
  runs, program, tmp_path, name, field
):
  workdir = tmp_path / "run"
  shutil.copytree(runs / "run", workdir)
  stored = json.loads(
    (workdir / "checkpoints/8/run_metadata/metadata").read_text()
  )
  shutil.copy(runs / "others" / name, workdir / name)
  words = field, workdir / name, stored[field]
  at = f"--workdir={workdir}"
  rows = tmp_path / "rows"
  text = f"--config.data.folder={runs / 'text'}"
  options = text, "--config.train.steps=8", "--config.train.eval_every=0"
  for arguments in (
    ["generate", at],
    ["evaluate", at],
    ["pack_memory", at, f"--output={rows}", "--format=int8"],
  ):
    refused(program(*arguments, configured=False), *words)
  refused(program("pretrain", at, *options), *words)
  new = tmp_path / "new"
  started = program(
    "pretrain", f"--workdir={new}", f"--init_from={workdir}", *options
  )
  refused(started, *words)
  assert not new.exists() and not rows.exists()


def test_rows_of_another_run_or_step(runs, program, tmp_path):
  run, names = runs / "run", {}
  for name, arguments in {
    "own": [f"--workdir={run}"],
    "step": [f"--workdir={run}", "--step=4"],
    "seed": [f"--workdir={runs / 'seed'}"],
  }.items():
    names[name] = tmp_path / f"{name}.rows"
    options = f"--output={names[name]}", "--format=float32"
    done = program("pack_memory", *arguments, *options, configured=False)
    assert done.returncode == 0, done.stderr
  assert RowFile(names["own"]).header.made_from == load_run(run).identity

  def read(name, *options, program_name="evaluate"):
    store = f"--store=file:{names[name]}"
    return program(
      program_name, f"--workdir={run}", store, *options, configured=False
    )

  assert read("own").returncode == 0
  for by in ("evaluate", "generate"):
    found = read("step", program_name=by)
    refused(found, f"step of {names['step']}: 4", "8", "allow_other_step")
    found = read("seed", "--allow_other_step", program_name=by)
    wanted = load_run(run).identity.run
    refused(found, f"run of {names['seed']}", wanted)
  allowed = read("step", "--allow_other_step")
  assert allowed.returncode == 0, allowed.stderr
  assert "holds the rows of step 4" in allowed.stderr
  found = program(
    "evaluate", f"--workdir={run}", "--allow_other_step", configured=False
  )
  refused(found, "allow_other_step", "file:PATH")


def held_out(folder, percent=5):
  from engram_jax.data.sources import split_of

  return [
    path
    for path in sorted(folder.iterdir())
    if split_of(path.name.encode(), validation_percent=percent) == "validation"
  ]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_text_edited_after_training_is_not_the_runs_own(runs, program, split):
  text = runs / "text"
  paths = held_out(text)
  others = [path for path in sorted(text.iterdir()) if path not in paths]
  path = (paths if split == "validation" else others)[0]
  before = path.read_text()
  at = f"--workdir={runs / 'run'}"
  try:
    path.write_text("other words than before\n" + before)
    done = program("evaluate", at, configured=False)
    refused(done, f"digest of the {split} text of {text}", "--folder")
    done = program(
      "evaluate", at, f"--folder={text}", "--batches=1", configured=False
    )
    assert done.returncode == 0, done.stderr
  finally:
    path.write_text(before)
  done = program("evaluate", at, "--batches=1", configured=False)
  assert done.returncode == 0, done.stderr
