"""Two processes of two devices each train as one process of four does.

Real programs on this machine, each in a process group of its own that is killed
in the end, whatever happens.
"""

import contextlib
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from engram_jax.training.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = ROOT / "tests" / "experiments" / "micro.py"
STEPS, LOST_AFTER, LIMIT = 8, 10, 240

# Trains and nothing more: what pretrain shows at its end takes time to compile.
TRAIN = """
from absl import flags
from engram_jax.training.loop import run
from experiments import cli
config = cli.define_config()
workdir = flags.DEFINE_string("workdir", None, "")
start = cli.define_processes()
main = lambda argv: run(cli.frozen(config.value), workdir.value) and None
cli.run(main, start_processes=start)
"""


class Runs:
  """Starts programs, and kills what is left of them."""

  def __init__(self, folder: pathlib.Path):
    self.folder, self.started, self.used = folder, [], 0
    text = folder / "text"
    text.mkdir()
    rng = random.Random(0)
    words = ["memory", "expert", "token", "gate", "row", "hash", "the", "of"]
    for i in range(30):
      line = " ".join(rng.choice(words) for _ in range(120))
      (text / f"document{i}.txt").write_text(line + "\n")
    (folder / "train.py").write_text(TRAIN)

  def start(self, workdir, *options, devices, program="train"):
    """One process."""
    what = ["-m", "experiments.pretrain"]
    what = what if program == "pretrain" else [str(self.folder / "train.py")]
    command = [
      sys.executable,
      *what,
      f"--config={CONFIG}",
      f"--config.data.folder={self.folder / 'text'}",
      f"--config.data.data_dir={self.folder / 'data'}",
      f"--config.train.steps={STEPS}",
      "--config.train.checkpoint_every=2",
      "--config.model.moe.dispatch=dense",
      "--config.mesh.data=2",
      "--config.mesh.expert=2",
      f"--workdir={self.folder / workdir}",
      *options,
    ]
    environment = {
      "JAX_PLATFORMS": "cpu",
      # Seconds to compile, not to run, are what these tests take.
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
      "--xla_backend_optimization_level=0 "
      "--xla_llvm_disable_expensive_passes=true",
      "PYTHONPATH": str(ROOT),
      "JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    # Files and not pipes: nobody reads while two write.
    self.used += 1
    out = self.folder / f"{self.used}.out"
    process = subprocess.Popen(
      command,
      cwd=ROOT,
      env=os.environ | environment,
      stdout=out.open("w"),
      stderr=subprocess.STDOUT,
      start_new_session=True,
    )
    process.out = out
    self.started.append(process)
    return process

  def pair(self, workdir, *options, each=((), ()), **how):
    """Two processes of one run."""
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      port = free.getsockname()[1]
    together = (
      f"--coordinator=127.0.0.1:{port}",
      "--num_processes=2",
      f"--lost_after={LOST_AFTER}",
    )
    return [
      self.start(
        workdir,
        *options,
        *together,
        f"--process_id={i}",
        *each[i],
        devices=2,
        **how,
      )
      for i in range(2)
    ]

  def losses(self, workdir):
    path = self.folder / workdir / "metrics.jsonl"
    return [r["loss"] for r in read_metrics(path, "train")]

  def end(self):
    for process in self.started:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
      process.wait()


def wait(*running, limit=LIMIT):
  """Their exit statuses and what they printed."""
  deadline = time.monotonic() + limit
  for process in running:
    try:
      process.wait(max(0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
      said = "\n---\n".join(p.out.read_text()[-3000:] for p in running)
      raise AssertionError(f"still running:\n{said}") from None
  return [p.returncode for p in running], [p.out.read_text() for p in running]


def wait_for_checkpoint(folder, *running):
  deadline = time.monotonic() + LIMIT
  while not folder.exists():
    assert time.monotonic() < deadline
    for process in running:
      assert process.poll() is None, process.out.read_text()
    time.sleep(0.01)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  runs = Runs(tmp_path_factory.mktemp("processes"))
  try:
    yield runs
  finally:
    runs.end()


@pytest.fixture(scope="module")
def alone(runs):
  """The losses of a run of one process."""
  statuses, said = wait(runs.start("alone", devices=4))
  assert statuses == [0], said
  losses = runs.losses("alone")
  assert len(losses) == STEPS
  return losses


@pytest.fixture(scope="module")
def both(runs):
  """The losses of a run of two."""
  statuses, said = wait(*runs.pair("both", program="pretrain"))
  assert statuses == [0, 0], said
  losses = runs.losses("both")
  assert len(losses) == STEPS
  assert "validation loss, with memory" in said[0]
  assert "experiments.generate --workdir" in said[0]
  for word in ("validation loss", "Tokens:", "step/s"):
    assert word not in said[1]
  for name in ("loss.png", "summary.json", "tokenizer.json"):
    assert (runs.folder / "both" / name).exists(), name
  return losses


def test_two_processes_train_as_one(alone, both):
  # Not bit for bit: the windows of a batch lie in another order.
  assert both == pytest.approx(alone, rel=1e-4)


@pytest.fixture(scope="module")
def lost(runs):
  """A run that lost a process: what the other said."""
  main, other = runs.pair("lost")
  checkpoints = runs.folder / "lost" / "checkpoints"
  wait_for_checkpoint(checkpoints / "2", main, other)
  os.killpg(other.pid, signal.SIGKILL)
  (status,), (said,) = wait(main, limit=LOST_AFTER + 20)
  other.wait()
  assert len(runs.losses("lost")) < STEPS, "it had finished before the kill"
  return status, said


def test_a_lost_process_ends_the_other_with_one_clear_line(lost):
  status, said = lost
  assert status == 1, said
  (line,) = [x for x in said.splitlines() if x.startswith("error: ")]
  assert "process lost: " in line and "the last checkpoint (step " in line
  assert "Traceback" not in said


def test_the_restart_goes_on_to_the_same_losses(runs, lost, both):
  shutil.copytree(runs.folder / "lost", runs.folder / "fewer")
  statuses, said = wait(*runs.pair("lost"))
  assert statuses == [0, 0], said
  assert "Resuming" in said[0]
  # Bit for bit would be too much: gloo adds in the order of arrival.
  assert runs.losses("lost") == pytest.approx(both, rel=1e-5)


def test_one_process_goes_on_with_the_run_of_two(runs, lost, both, alone):
  if not (runs.folder / "fewer").exists():
    shutil.copytree(runs.folder / "lost", runs.folder / "fewer")
  statuses, said = wait(runs.start("fewer", devices=4))
  assert statuses == [0] and "Resuming" in said[0], said
  assert runs.losses("fewer") == pytest.approx(both, rel=1e-4)


def test_sigterm_to_one_stops_both_with_a_checkpoint(runs):
  main, other = runs.pair("stopped", "--config.train.steps=100000")
  checkpoints = runs.folder / "stopped" / "checkpoints"
  wait_for_checkpoint(checkpoints / "2", main, other)
  other.send_signal(signal.SIGTERM)
  statuses, said = wait(main, other)
  assert statuses == [0, 0], said
  saved = max(int(p.name) for p in checkpoints.iterdir() if p.name.isdigit())
  assert saved == len(runs.losses("stopped"))


MISTAKES = {
  "a coordinator alone": (
    ("--coordinator=127.0.0.1:1",),
    ["num_processes", "coordinator"],
  ),
  "no address": (
    ("--coordinator=here", "--num_processes=2", "--process_id=0"),
    ["coordinator", "here", "HOST:PORT"],
  ),
  "no such process": (
    ("--coordinator=127.0.0.1:1", "--num_processes=2", "--process_id=2"),
    ["process_id", "2"],
  ),
  "no cluster": (("--distributed",), ["distributed"]),
}


def test_a_wrong_start_is_one_clear_line(runs):
  started = [
    runs.start("mistake", *arguments, devices=1)
    for arguments, _ in MISTAKES.values()
  ]
  statuses, said = wait(*started)
  assert statuses == [2] * len(started), said
  for text, (_, words) in zip(said, MISTAKES.values(), strict=True):
    assert_one_line(text, words)


def test_a_wrong_mesh_is_one_clear_line_of_each(runs):
  statuses, said = wait(*runs.pair("mesh", "--config.mesh.data=3"))
  assert statuses == [2, 2], said
  for text in said:
    assert_one_line(text, ["mesh.data", "6", "4"])


def test_a_mistake_of_one_is_one_clear_line_of_each(runs):
  each = ((), ("--config.train.learning_rate=0.5",))
  statuses, said = wait(*runs.pair("different", each=each))
  assert statuses == [2, 2], said
  for text in said:
    assert_one_line(text, ["train.learning_rate", "0.5"])


def test_a_tensor_group_across_processes_is_refused(runs):
  mesh = ("data=1", "expert=1", "tensor=4")
  options = [f"--config.mesh.{axis}" for axis in mesh]
  statuses, said = wait(*runs.pair("tensor", *options))
  assert statuses == [2, 2], said
  for text in said:
    assert_one_line(text, ["mesh.tensor", "4", "process"])


def assert_one_line(said, words):
  lines = [x for x in said.splitlines() if x.startswith("error: ")]
  assert len(lines) == 1, said
  assert "Traceback" not in said
  for word in words:
    assert word in lines[0]
