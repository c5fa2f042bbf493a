"""The training loop: data in, steps, evaluations, checkpoints, metrics out.

A run is its folder (`runs.py`). Started on the folder of the same run it goes
on from the newest checkpoint, bit for bit as if it had never stopped. SIGTERM
and SIGINT end it after the step in progress with a checkpoint.
"""

import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np
import tqdm
from absl import logging

from engram_jax.config import ExperimentConfig
from engram_jax.data.pipeline import batches
from engram_jax.data.prepared import PreparedData, prepare
from engram_jax.errors import require
from engram_jax.memory.hashing import NgramHash
from engram_jax.training.checkpoints import Checkpoints, check_constants
from engram_jax.training.evaluation import make_eval_step, mean_loss
from engram_jax.training.metrics import MetricsWriter
from engram_jax.training.runs import (
  RunFolder,
  constants,
  make_memory,
  new_state,
  open_folder,
  save_tokenizer_of_run,
)
from engram_jax.training.state import TrainState, abstract_model
from engram_jax.training.step import Program, make_train_step


class NonFiniteError(RuntimeError):
  """A loss or gradient is not finite: the step, and the metric to look at."""


@dataclasses.dataclass(frozen=True, eq=False)
class RunResult:
  """What a call of `run` did.

  Attributes:
    folder: where everything is.
    state: at the end.
    program: what was trained.
    data: the prepared text.
    finished: False when a signal ended the run early.
    compile_seconds: of the training step.
    tokens_per_second: over this call's steps, without evaluations,
      checkpoints and compilation; NaN if it took none.
    skipped_steps: steps of this call that were not applied, as not finite.
  """

  folder: RunFolder
  state: TrainState
  program: Program
  data: PreparedData
  finished: bool
  compile_seconds: float
  tokens_per_second: float
  skipped_steps: int


def run(
  config: ExperimentConfig,
  workdir: str | os.PathLike,
  *,
  progress: bool = True,
) -> RunResult:
  """Trains, or goes on training, until `config.train.steps`.

  Args:
    config: the whole run.
    workdir: its folder; new, empty, or of the same run.
    progress: tell on standard error what is done, with a progress bar.

  Raises:
    InputError: a folder of another run, data that do not fit.
    NonFiniteError: with `on_nonfinite="stop"`.
  """
  train = config.train
  say = _say if progress else lambda line: None
  folder = open_folder(workdir, config)
  say("Preparing the text (done once for each text and tokenizer) ...")
  data = prepare(config.data)
  sizes = {name: f"{info.tokens:,}" for name, info in data.splits.items()}
  say(f"Tokens: {sizes['train']} to train on, {sizes['validation']} held out")
  require(
    data.vocab_size <= config.model.vocab_size,
    "model.vocab_size",
    config.model.vocab_size,
    f"at least the tokenizer's {data.vocab_size}",
  )
  hashing, compression = make_memory(config, data.tokenizer)
  save_tokenizer_of_run(folder, data.tokenizer_path, compression)
  iterator = iter(
    batches(
      data,
      "train",
      seq_len=train.seq_len,
      batch_size=train.batch_size,
      seed=train.seed,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
  )
  evaluation = (
    list(evaluation_batches(config, data)) if train.eval_every else []
  )

  with contextlib.ExitStack() as stack:
    saved = stack.enter_context(
      Checkpoints(
        folder.checkpoints,
        keep_last=train.keep_last,
        keep_best=train.keep_best,
      )
    )
    stored = None
    if saved.latest_step() is not None:
      stored = saved.read_constants()
      if hashing is not None and stored["hash"] is not None:
        # The stored constants count, whatever this NumPy would draw.
        hashing = NgramHash.from_dict(stored["hash"])
    expected = constants(
      config,
      hashing=hashing,
      compression=compression,
      tokenizer=data.tokenizer,
      data_digest=data.splits["train"].digest,
    )
    if stored is not None:
      check_constants(stored, expected)
    graph, _, _ = abstract_model(config.model)
    program = Program.create(
      config.model, train, graph, hashing=hashing, compression=compression
    )
    if stored is not None:
      template = jax.eval_shape(lambda: new_state(program))
      state = saved.restore(template, data_iterator=iterator)
      say(f"Resuming {folder.path} at step {int(state.step)}")
    else:
      state = jax.jit(lambda: new_state(program))()

    writer = stack.enter_context(MetricsWriter(folder.path))
    loop = _Loop(config, writer, saved, program, evaluation, expected)
    stop = stack.enter_context(_stop_signals())
    state = loop.train(state, iterator, stop=stop, progress=progress)
    saved.wait()
  return RunResult(
    folder=folder,
    state=state,
    program=program,
    data=data,
    finished=int(state.step) >= train.steps,
    compile_seconds=loop.compile_seconds,
    tokens_per_second=loop.tokens / loop.seconds if loop.tokens else np.nan,
    skipped_steps=loop.skipped,
  )


def _say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def evaluation_batches(
  config: ExperimentConfig, data: PreparedData
) -> Iterator[dict[str, np.ndarray]]:
  """The same first batches of the validation split at every evaluation."""
  train = config.train
  held_out = batches(
    data,
    "validation",
    seq_len=train.seq_len,
    batch_size=train.batch_size // train.accumulation,
    shuffle=False,
    epochs=1,
    drop_remainder=False,
  )
  for _, batch in zip(range(train.eval_batches), held_out):
    yield batch


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
  """A list that fills when the process is asked to stop."""
  received: list[int] = []

  def note(number, frame):
    received.append(number)

  previous = {}
  for number in (signal.SIGTERM, signal.SIGINT):
    # Only the main thread may; a notebook's thread goes without.
    with contextlib.suppress(ValueError):
      previous[number] = signal.signal(number, note)
  try:
    yield received
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


class _Loop:
  """One call of `run`: the steps, and what is counted on the way."""

  def __init__(self, config, writer, saved, program, evaluation, constants_):
    self.train_config = config.train
    self.saved, self.program = saved, program
    self.evaluation, self.constants = evaluation, constants_
    self.writer = writer
    self.eval_step = make_eval_step(program)
    self.compile_seconds = 0.0
    self.seconds = 0.0  # of steps alone
    self.tokens = self.skipped = 0

  def train(self, state, iterator, *, stop, progress) -> TrainState:
    """Steps until the end or a signal; the state is consumed."""
    config, step = self.train_config, int(state.step)
    if step >= config.steps:
      return state
    batch = next(iterator)
    if progress:
      _say("Compiling the step ...")
    start = time.perf_counter()
    compiled = make_train_step(self.program).lower(state, batch).compile()
    self.compile_seconds = time.perf_counter() - start
    self.writer.write(
      step, {"compile_seconds": self.compile_seconds}, kind="run"
    )

    with tqdm.tqdm(
      total=config.steps, initial=step, disable=not progress, unit="step"
    ) as bar:
      while True:
        start = time.perf_counter()
        state, metrics = compiled(state, batch)
        # One small transfer a step: a step that is not finite must be the
        # last one.
        metrics = jax.device_get(metrics)
        step += 1
        elapsed = time.perf_counter() - start
        self.seconds += elapsed
        self.tokens += batch["inputs"].size
        self._check_finite(step, metrics)
        if step % config.log_every == 0 or step == config.steps:
          rate = {"tokens_per_second": batch["inputs"].size / elapsed}
          self.writer.write(step, {**metrics, **rate})
        bar.update()
        bar.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)

        last = step >= config.steps or bool(stop)
        saves = last or step % config.checkpoint_every == 0
        self._evaluate_and_save(state, step, iterator, saves=saves, last=last)
        if last:
          break
        batch = next(iterator)
    if stop and step < config.steps:
      name = signal.Signals(stop[0]).name
      logging.warning("%s: saved step %d and stopped", name, step)
    return state

  def _check_finite(self, step: int, metrics: dict) -> None:
    if metrics["finite"]:
      return
    names = ("loss", "grad_norm")
    name = next(n for n in names if not np.isfinite(metrics[n]))
    line = f"step {step}: {name} is {metrics[name]}; the step was not applied"
    if self.train_config.on_nonfinite == "stop":
      self.writer.write(step, metrics)
      raise NonFiniteError(line)
    self.skipped += 1
    logging.warning("%s", line)

  def _evaluate_and_save(self, state, step, iterator, *, saves, last) -> None:
    every, loss = self.train_config.eval_every, None
    # A checkpoint competes for the best by a loss of its own step.
    if every and (step % every == 0 or saves):
      loss = mean_loss(
        self.eval_step,
        self.program.model_of(state),
        state.tables,
        self.evaluation,
      )
      self.writer.write(step, {"loss": loss}, kind="eval")
    if saves:
      self.saved.save(
        step,
        state,
        data_iterator=iterator,
        constants=self.constants,
        eval_loss=loss,
      )
