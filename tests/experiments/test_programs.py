"""The programs as a user runs them: from nothing to a text, and every mistake.

The long ones start real processes and kill them.
"""

import json
import random
import shutil
import signal
import time

import numpy as np
import pytest

from engram_jax.memory.hashing import NgramHash
from engram_jax.stores.open_store import pack_tables
from engram_jax.stores.quantization import RowFormat
from engram_jax.stores.row_file_headers import Header
from engram_jax.stores.row_files import write_row_file
from engram_jax.training.metrics import read_metrics
from engram_jax.training.runs import load_run


@pytest.fixture(scope="module")
def finished(program, tmp_path_factory):
  """A run that was never interrupted: its folder, and what it printed."""
  workdir = tmp_path_factory.mktemp("finished") / "run"
  done = program("pretrain", f"--workdir={workdir}")
  assert done.returncode == 0, done.stderr
  return workdir, done.stdout


def losses(workdir):
  """(step, loss) of training and evaluation."""
  return [
    [(r["step"], r["loss"]) for r in read_metrics(workdir / "metrics.jsonl", k)]
    for k in ("train", "eval")
  ]


def test_pretrain_leaves_everything_a_user_looks_for(finished):
  workdir, printed = finished
  for name in (
    "config.json tokenizer.json compression.npz metrics.jsonl loss.png "
    "gates.png sample.txt summary.json checkpoints tensorboard"
  ).split():
    assert (workdir / name).exists(), name
  for line in (
    "validation loss, with memory",
    "validation loss, memory off",
    "validation loss, wrong rows",
    "parameters",
    "tokens/s",
    str(workdir),
  ):
    assert line in printed
  train, evaluation = losses(workdir)
  assert [step for step, _ in train] == list(range(1, 13))
  assert [step for step, _ in evaluation] == [4, 8, 12]
  assert evaluation[-1][1] < evaluation[0][1]
  record = read_metrics(workdir / "metrics.jsonl", "train")[-1]
  for name in (
    "tokens_per_second",
    "max_violation/0",
    "dropped",
    "gate_mean/layer_1/stream_0",
    "rows_touched/1",
  ):
    assert name in record
  (compiled,) = read_metrics(workdir / "metrics.jsonl", "run")
  assert compiled["compile_seconds"] > 0


def test_a_finished_run_started_again_only_reports(finished, program):
  workdir, _ = finished
  before = losses(workdir)
  summary = json.loads((workdir / "summary.json").read_text())
  # An empty folder there hides nothing.
  (workdir / "checkpoints" / "20").mkdir()
  again = program("pretrain", f"--workdir={workdir}")
  assert again.returncode == 0, again.stderr
  assert "left out: empty" in again.stderr
  assert "validation loss, with memory" in again.stdout
  assert losses(workdir) == before
  text = (workdir / "summary.json").read_text()
  found = json.loads(text, parse_constant=pytest.fail)
  for name in ("tokens_per_second", "compile_seconds"):
    assert found[name] == summary[name] > 0


def test_sigterm_saves_and_the_restart_goes_on_bit_for_bit(
  finished, program, tmp_path
):
  workdir = tmp_path / "run"
  process = program("pretrain", f"--workdir={workdir}", wait=False)
  wait_for_steps(workdir, 2)
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=120)
  assert process.returncode == 0, err
  if "stopped at step" in out:  # else it had finished before the signal
    assert "run again to continue" in out
    done = program("pretrain", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
  assert_same_losses(workdir, finished[0])


def test_kill_9_at_any_moment_loses_no_more_than_a_checkpoint(
  finished, program, tmp_path
):
  """Kills a real run again and again; then lets it finish."""
  workdir, rng = tmp_path / "run", random.Random(1)
  kills = 0
  # A checkpoint at every step: most kills hit a save.
  options = (f"--workdir={workdir}", "--config.train.checkpoint_every=1")
  for _ in range(6):
    process = program("pretrain", *options, wait=False)
    before = latest_checkpoint(workdir)
    deadline = time.monotonic() + 120
    # Let it come one checkpoint further, and a random moment on.
    while process.poll() is None and latest_checkpoint(workdir) <= before:
      assert time.monotonic() < deadline, process.communicate()[1]
      time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.3))
    process.kill()
    _, err = process.communicate()
    kills += process.returncode == -signal.SIGKILL
    assert process.returncode in (0, -signal.SIGKILL), err
    if process.returncode == 0:
      break
  assert kills >= 2
  done = program("pretrain", *options)
  assert done.returncode == 0, done.stderr
  assert_same_losses(workdir, finished[0])


def assert_same_losses(workdir, uninterrupted):
  """Bit for bit; a stop or a checkpoint only adds evaluations of its own."""
  train, evaluation = losses(workdir)
  expected_train, expected_evaluation = losses(uninterrupted)
  assert train == expected_train
  assert dict(evaluation).items() >= dict(expected_evaluation).items()


def wait_for_steps(workdir, steps):
  deadline = time.monotonic() + 120
  path = workdir / "metrics.jsonl"
  while not path.exists() or path.read_text().count('"train"') < steps:
    assert time.monotonic() < deadline
    time.sleep(0.02)


def latest_checkpoint(workdir) -> int:
  folder = workdir / "checkpoints"
  if not folder.exists():
    return -1
  names = [p.name for p in folder.iterdir() if p.name.isdigit()]
  return max(map(int, names), default=-1)


def test_evaluate_and_generate(finished, program, text_folder, tmp_path):
  workdir, _ = finished
  out = tmp_path / "evaluation.json"
  done = program(
    "evaluate", f"--workdir={workdir}", f"--out={out}", configured=False
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(out.read_text())
  assert set(found["loss"]) == {"on", "off", "shuffled"}
  assert found["step"] == 12

  other = tmp_path / "other"
  shutil.copytree(text_folder, other)
  done = program(
    "evaluate",
    f"--workdir={workdir}",
    f"--folder={other}",
    "--glob=*.txt",
    "--batches=1",
    configured=False,
  )
  assert done.returncode == 0 and str(other) in done.stdout, done.stderr

  prompts = ["--prompt=the memory", "--prompt=a"]
  both = program(
    "generate", f"--workdir={workdir}", "--tokens=6", *prompts, configured=False
  )
  assert both.returncode == 0, both.stderr
  first, second = both.stdout.rstrip("\n").split("\n\n---\n\n")
  alone = program(
    "generate",
    f"--workdir={workdir}",
    "--tokens=6",
    prompts[0],
    configured=False,
  )
  assert alone.stdout.rstrip("\n") == first
  assert second.startswith("a")


@pytest.fixture(scope="module")
def row_file(finished, tmp_path_factory):
  """The finished run's rows, as they are."""
  trained = load_run(finished[0])
  hashing, digest = trained.memory.hashing, trained.memory.compression.digest
  packed, row_format = pack_tables(trained.tables, hashing, "float32")
  path = tmp_path_factory.mktemp("rows") / "memory.rows"
  header = Header(row_format, hashing.num_rows, hashing, digest)
  write_row_file(path, {i: [x] for i, x in packed.items()}, header)
  return path


def test_evaluate_from_any_location(finished, row_file, program, tmp_path):
  def losses_of(*options):
    out = tmp_path / "out.json"
    done = program(
      "evaluate",
      f"--workdir={finished[0]}",
      "--batches=2",
      f"--out={out}",
      *options,
      configured=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())["loss"]

  expected = losses_of()
  options = f"--store=file:{row_file}", "--cache_mib=0.001", "--verify"
  assert losses_of(*options) == expected
  rounded = losses_of("--store=host", "--row_format=int8", "--noprefetch")
  assert 0 < abs(rounded["on"] - expected["on"]) < 0.01
  assert rounded["off"] == expected["off"]


def test_generate_from_any_location(finished, row_file, program):
  def generated(*options):
    done = program(
      "generate",
      f"--workdir={finished[0]}",
      "--tokens=6",
      "--prompt=the memory",
      "--prompt=a",
      *options,
      configured=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

  expected = generated()
  # The checkpoint's own tables are not looked at.
  tables = finished[0] / "checkpoints" / "12" / "memory"
  hidden = tables.rename(tables.with_name("hidden"))
  try:
    assert generated(f"--store=file:{row_file}", "--slots=1") == expected
  finally:
    hidden.rename(tables)
  options = ("--store=pinned", "--cache_mib=0.01", "--noprefetch")
  assert generated(*options) == expected


@pytest.mark.parametrize(
  "options, words",
  [
    (["--cache_mib=nan"], ["cache_mib", "nan"]),
    (["--cache_mib=-1"], ["cache_mib", "-1"]),
    (["--cache_mib=1e-9"], ["capacity_bytes", "1"]),
    (["--verify"], ["verify", "file:PATH"]),
    (["--store=host", "--verify"], ["verify", "file:PATH"]),
  ],
)
def test_a_store_that_cannot_be_is_one_clear_line(
  finished, program, options, words
):
  done = program(
    "evaluate", f"--workdir={finished[0]}", *options, configured=False
  )
  assert_one_line(done, words)


def test_a_row_file_of_another_model_is_one_clear_line(
  finished, program, tmp_path
):
  trained = load_run(finished[0])
  constants = trained.memory.hashing.to_dict()
  constants["pad_id"] += 1
  other = NgramHash.from_dict(constants)
  row_format, rows = RowFormat("float32", 4), other.num_rows
  digest = trained.memory.compression.digest
  path = tmp_path / "other.rows"
  header = Header(row_format, rows, other, digest)
  chunks = {i: [np.zeros((n, 16), np.uint8)] for i, n in rows.items()}
  write_row_file(path, chunks, header)
  for name in ("generate", "evaluate"):
    done = program(
      name,
      f"--workdir={finished[0]}",
      f"--store=file:{path}",
      configured=False,
    )
    assert_one_line(done, ["hash.pad_id", str(path)])


MISTAKES = {
  "a typo in a field": (
    ["--config.model.hiden_size=32"],
    ["hiden_size", "hidden_size"],
  ),
  "a field of what is None": (
    ["--config.model.attention.yarn.scale=8"],
    ["attention.yarn.scale", "is None"],
  ),
  "a missing config": (["--config=nowhere.py"], ["nowhere.py"]),
  "a missing folder": (["--config.data.folder=/no/such/folder"], ["/no/such"]),
  "an empty corpus": (["--config.data.glob=*.none"], ["*.none"]),
  "a sequence too long": (
    ["--config.train.seq_len=1000000"],
    ["seq_len", "1000000"],
  ),
  "a vocabulary too small": (["--config.model.vocab_size=270"], ["vocab_size"]),
  "a pad id outside": (
    ["--config.model.engram.pad_id=299"],
    ["pad_id", "299"],
  ),
  "sizes at odds": (
    ["--config.model.hidden_size=32"],
    ["engram.hidden_size", "32"],
  ),
  "more experts than there are": (["--config.model.moe.top_k=5"], ["top_k"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line(mistake, program, tmp_path):
  arguments, words = MISTAKES[mistake]
  done = program("pretrain", f"--workdir={tmp_path / 'run'}", *arguments)
  assert_one_line(done, words)


def test_a_workdir_of_another_config_is_one_clear_line(finished, program):
  workdir, _ = finished
  done = program(
    "pretrain", f"--workdir={workdir}", "--config.train.learning_rate=0.5"
  )
  assert_one_line(done, ["train.learning_rate", "0.5", "0.01", str(workdir)])


def test_a_folder_without_a_run_is_one_clear_line(program, tmp_path):
  for name in ("evaluate", "generate"):
    done = program(name, f"--workdir={tmp_path / 'no'}", configured=False)
    assert_one_line(done, ["workdir", str(tmp_path / "no")])


def test_a_step_that_is_not_finite_stops_the_run(program, tmp_path):
  done = program(
    "pretrain",
    f"--workdir={tmp_path / 'run'}",
    # Weights of 1e30 overflow float32 in the first product.
    "--config.model.init_std=1e30",
    "--config.train.eval_every=0",
  )
  assert_one_line(done, ["step 1", "not applied"], status=3)
  again = program(
    "pretrain",
    f"--workdir={tmp_path / 'run'}",
    "--config.model.init_std=1e30",
    "--config.train.eval_every=0",
  )
  assert_one_line(again, ["step 1", "diverged.json"], status=3)


def assert_one_line(done, words, status=2):
  assert done.returncode == status, done.stderr
  lines = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
  assert len(lines) == 1, done.stderr
  assert "Traceback" not in done.stderr
  for word in words:
    assert word in lines[0]
