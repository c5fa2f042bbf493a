"""Texts as people have them: one file, a folder with runs in it, six tokens."""

import json
import os
import random
import shutil

import pytest

from engram_jax.training.metrics import read_metrics


@pytest.fixture(scope="module")
def one_file(tmp_path_factory):
  folder = tmp_path_factory.mktemp("one")
  rng = random.Random(0)
  words = "memory expert token gate row hash".split()
  lines = [" ".join(rng.choices(words, k=12)) for _ in range(200)]
  (folder / "input.txt").write_text("\n".join(lines))
  return folder


@pytest.fixture(scope="module")
def trained(program, one_file, tmp_path_factory):
  """A run on one file, without evaluations on the way."""
  workdir = tmp_path_factory.mktemp("trained") / "run"
  done = program(
    "pretrain",
    f"--workdir={workdir}",
    f"--config.data.folder={one_file}",
    "--config.train.eval_every=0",
    "--config.train.steps=4",
  )
  assert done.returncode == 0, done.stderr
  return workdir, done


def test_one_file_is_enough(trained):
  workdir, done = trained
  assert "too few documents to hold some of them out" in done.stderr
  for name in ("summary.json", "loss.png", "gates.png", "sample.txt"):
    assert (workdir / name).exists(), name
  assert set(read_summary(workdir)["validation_loss"]) >= {"on", "off"}


def read_summary(workdir):
  return json.loads((workdir / "summary.json").read_text())


@pytest.mark.parametrize("prompt", ("", os.fsdecode(b"caf\xe9")))
def test_a_prompt_that_is_none_is_refused_before_training(
  prompt, program, tmp_path
):
  workdir = tmp_path / "run"
  done = program("pretrain", f"--workdir={workdir}", f"--prompt={prompt}")
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1].startswith("error: prompt: '")
  assert not workdir.exists()


def test_runs_and_results_in_the_folder_of_the_text(
  program, one_file, tmp_path
):
  """The same command again goes on; the rest of the folder is the text."""
  text = tmp_path / "text"
  shutil.copytree(one_file, text)
  options = (
    f"--workdir={text / 'runs' / 'a'}",
    f"--config.data.folder={text}",
    f"--config.data.data_dir={text / 'data'}",
    "--config.data.glob=*",
    "--config.train.steps=4",
  )
  for _ in range(2):
    done = program("pretrain", *options)
    assert done.returncode == 0, done.stderr
  assert "Resuming" in done.stderr
  assert "Left out of the text: the program's own folder" in done.stderr
  losses = []
  for _ in range(2):
    out = text / "rated" / "figures.json"
    done = program(
      "evaluate", f"--workdir={text}/runs/a", f"--out={out}", configured=False
    )
    assert done.returncode == 0, done.stderr
    losses.append(json.loads(out.read_text())["loss"])
  assert losses[0] == losses[1]
  assert "a result: rated/figures.json" in done.stderr


def test_weights_bring_their_tokenizer_to_any_text(
  trained, program, text_folder, tmp_path
):
  """Another text and another vocabulary; resumed, and rated."""
  source, _ = trained
  text, workdir = tmp_path / "text", tmp_path / "run"
  shutil.copytree(text_folder, text)
  (text / "more.txt").write_text("quartz zephyr jumbled vow\n" * 20)
  options = (
    f"--workdir={workdir}",
    f"--init_from={source}",
    f"--config.data.folder={text}",
    "--config.data.vocab_size=290",
    "--config.train.seq_len=8",
  )
  for steps, said in ((4, "Starting from step 4"), (4, "Resuming")):
    done = program("pretrain", *options, f"--config.train.steps={steps}")
    assert done.returncode == 0, done.stderr
    assert said in done.stderr
    assert "The tokenizer comes with the weights: " in done.stderr
  assert len(read_metrics(workdir / "metrics.jsonl", "train")) == 4
  for name in ("tokenizer.json", "compression.npz"):
    assert (workdir / name).exists()
  mine, theirs = (x / "tokenizer.json" for x in (workdir, source))
  assert json.loads(mine.read_text()) == json.loads(theirs.read_text())
  rated = program("evaluate", f"--workdir={workdir}", configured=False)
  assert rated.returncode == 0, rated.stderr


def test_rating_six_tokens_and_a_large_text(trained, program, tmp_path):
  workdir, _ = trained
  text = tmp_path / os.fsdecode(b"caf\xe9")
  text.mkdir()
  (text / "a").write_text("abcde")
  out = tmp_path / "figures.json"
  options = (f"--workdir={workdir}", f"--folder={text}", f"--out={out}")
  done = program("evaluate", *options, configured=False)
  assert done.returncode == 0, done.stderr
  found = json.loads(out.read_text())
  assert (found["batches"], found["batches_present"]) == (1, 1)
  assert all(loss > 0 for loss in found["loss"].values())
  (text / "b").write_text("memory expert token " * 500)
  done = program("evaluate", *options, "--batches=2", configured=False)
  assert done.returncode == 0, done.stderr
  assert "The first 2 of " in done.stderr and "--batches=0" in done.stderr


def test_figures_that_cannot_be_written_are_refused_first(
  trained, program, tmp_path
):
  done = program(
    "evaluate",
    f"--workdir={trained[0]}",
    f"--out={tmp_path}",
    configured=False,
  )
  assert done.returncode == 2
  assert done.stderr.splitlines() == [
    f"error: out: {tmp_path}; valid: a file: this is a folder"
  ]
