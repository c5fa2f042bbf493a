"""The training loop: data in, steps, evaluations, checkpoints, metrics out.

A run is its folder (`runs.py`). Started on the folder of the same run it goes
on from the newest checkpoint, bit for bit as if it had never stopped. SIGTERM
and SIGINT end it after the step in progress with a checkpoint.

Several processes (`processes.py`) call `run` alike. Process 0 makes the folder
and writes what is not an array; each reads its own part of every batch, and all
write the checkpoints. A signal to one of them ends all after the same step.
"""

import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import tqdm
from absl import logging
from jax.sharding import Mesh

from engram_jax import sharding
from engram_jax.data.pipeline import batches, held_out_batches
from engram_jax.data.prepared import PreparedData, prepare
from engram_jax.errors import InputError, require
from engram_jax.memory.hashing import NgramHash
from engram_jax.memory.stores import TableStore
from engram_jax.run_config import ExperimentConfig
from engram_jax.training import processes
from engram_jax.training.checkpoints import Checkpoints, check_constants
from engram_jax.training.evaluation import mean_loss
from engram_jax.training.metrics import MetricsWriter
from engram_jax.training.program import Program
from engram_jax.training.runs import (
  RunFolder,
  abstract_state,
  constants,
  make_memory,
  new_state,
  open_folder,
  save_tokenizer_of_run,
)
from engram_jax.training.starting import (
  find_origin,
  record_origin,
  state_from,
)
from engram_jax.training.state import TrainState, abstract_model
from engram_jax.training.step import make_train_step


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
  init_from: str | os.PathLike | None = None,
  init_step: int | None = None,
  progress: bool = True,
) -> RunResult:
  """Trains, or goes on training, until `config.train.steps`.

  Args:
    config: the whole run.
    workdir: its folder; new, empty, or of the same run.
    init_from: the folder of another run, whose weights a new one starts from;
      see `starting.py`. Not looked at once the run has a checkpoint.
    init_step: of the other run's checkpoint; None for the newest.
    progress: tell on standard error what is done, with a progress bar.

  Raises:
    InputError: a folder of another run, data or weights that do not fit.
    NonFiniteError: with `on_nonfinite="stop"`.
    ProcessLostError: another process of the run is gone.
  """
  train = config.train
  progress = progress and processes.is_main()
  say = _say if progress else lambda line: None
  mesh = processes.together(lambda: _make_mesh(config))
  if mesh is not None:
    say(f"Devices: {', '.join(f'{a} {n}' for a, n in mesh.shape.items())}")
  origin = find_origin(
    workdir, config, init_from=init_from, init_step=init_step
  )
  folder = processes.together(
    lambda: open_folder(workdir, config), main_first=True
  )
  say("Preparing the text (done once for each text and tokenizer) ...")
  data = processes.together(lambda: prepare(config.data), main_first=True)
  sizes = {name: f"{info.tokens:,}" for name, info in data.splits.items()}
  say(f"Tokens: {sizes['train']} to train on, {sizes['validation']} held out")
  hashing, compression, iterator, evaluation = processes.together(
    lambda: _prepare_run(config, folder, data)
  )

  with contextlib.ExitStack() as stack:
    saved = Checkpoints(
      folder.checkpoints,
      keep_last=train.keep_last,
      keep_best=train.keep_best,
    )
    stack.push(_closing(saved))
    stack.enter_context(
      processes.saying_what_was_lost(lambda: _how_to_go_on(folder))
    )
    stored = None
    if saved.latest_step() is not None:
      stored = saved.read_constants()
    known = stored or (origin and origin.constants)
    if known and hashing is not None and known["hash"] is not None:
      # The stored constants count, whatever this NumPy would draw.
      hashing = NgramHash.from_dict(known["hash"])
    expected = constants(
      config,
      hashing=hashing,
      compression=compression,
      tokenizer=data.tokenizer,
      data_digest=data.splits["train"].digest,
    )
    if stored is not None:
      check_constants(stored, expected)
    elif origin is not None:
      origin.require_same(expected)
    processes.together(lambda: _require_as_on_main(expected))
    graph, _, _ = abstract_model(config.model)
    program = Program.create(
      config.model,
      train,
      graph,
      hashing=hashing,
      compression=compression,
      mesh=mesh,
      mesh_config=config.mesh,
    )
    if stored is not None:
      state = saved.restore(abstract_state(program), data_iterator=iterator)
      say(f"Resuming {folder.path} at step {int(state.step)}")
      if init_from is not None:
        say(f"Not from {init_from}: the run has checkpoints of its own")
    elif origin is not None:
      if processes.is_main():
        record_origin(folder, origin)
      say(f"Starting from step {origin.step} of {origin.folder.path}")
      state = state_from(origin, program)
    else:
      state = new_state(program)

    writer = stack.enter_context(
      MetricsWriter(folder.path, enabled=processes.is_main())
    )
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


def _make_mesh(config: ExperimentConfig) -> Mesh | None:
  """The mesh, for which every process reads the rows of its own devices."""
  mesh = sharding.make_mesh(config.mesh)
  sharding.require_fit(config, mesh)
  if mesh is None:
    return None
  # One row for each part of the batch, and who holds it.
  parts = sharding.size(mesh, *sharding.BATCH)
  placed = sharding.batch_sharding(mesh).devices_indices_map((parts, 1))
  owners: dict[int, set[int]] = {}
  for device, (rows, _) in placed.items():
    owners.setdefault(rows.start or 0, set()).add(device.process_index)
  valid = "a size with which the devices of a tensor group are one process's"
  alone = all(len(of_row) == 1 for of_row in owners.values())
  require(alone, "mesh.tensor", config.mesh.tensor, valid)
  return mesh


def _prepare_run(config: ExperimentConfig, folder: RunFolder, data):
  """Hash, compression, iterator, held-out batches; the folder's tokenizer."""
  train = config.train
  require(
    data.vocab_size <= config.model.vocab_size,
    "model.vocab_size",
    config.model.vocab_size,
    f"at least the tokenizer's {data.vocab_size}",
  )
  hashing, compression = make_memory(config, data.tokenizer)
  if processes.is_main():
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
  return hashing, compression, iterator, evaluation


def _require_as_on_main(expected: dict[str, Any]) -> None:
  """Refuses a process with other text, tokenizer or hash than process 0's."""
  main = processes.from_main(expected)
  try:
    check_constants(main, expected)
  except InputError as error:
    was = error.value.removesuffix(" in the checkpoint")
    me = jax.process_index()
    valid = f"{was}, as in process 0; process {me} has {error.valid}"
    raise InputError(error.field, error.valid, valid) from None


def _closing(saved: Checkpoints) -> Callable[..., None]:
  """What an `ExitStack` calls at its end."""

  def close(kind, error, trace) -> None:
    # What is being written cannot be finished without a lost process; Orbax
    # would wait for it for many minutes.
    if kind is None or not issubclass(kind, processes.ProcessLostError):
      saved.close()

  return close


def _how_to_go_on(folder: RunFolder) -> str:
  """What to do after a loss. From the disk: Orbax may wait for the lost."""
  steps = folder.saved_steps()
  where = f"the last checkpoint (step {steps[-1]})" if steps else "the start"
  return f"start all processes again to continue from {where}"


def _say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def evaluation_batches(
  config: ExperimentConfig, data: PreparedData
) -> Iterator[dict[str, np.ndarray]]:
  """The same first batches of the validation split at every evaluation."""
  train = config.train
  return held_out_batches(
    data,
    "validation",
    seq_len=train.seq_len,
    batch_size=train.batch_size // train.accumulation,
    most=train.eval_batches,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )


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
    self.compile_seconds = 0.0
    self.seconds = 0.0  # of steps alone
    self.tokens = self.skipped = 0

  def train(self, state, iterator, *, stop, progress) -> TrainState:
    """Steps until the end or a signal; the state is consumed."""
    config, step = self.train_config, int(state.step)
    if step >= config.steps:
      return state
    batch = self._next(iterator)
    room = self.program.capacity(batch)
    if progress:
      _say("Compiling the step ...")
    compiled, self.compile_seconds = self._compile(state, batch, room)
    # A collective waits half a minute only, for a slower compilation elsewhere.
    processes.barrier("compiled")
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
        # last one, and one without room for its rows is taken again.
        metrics = processes.fetch(metrics)
        if not room.suffices(metrics.get("lookup_needed", 0)):
          compiled, _ = self._compile(state, batch, room)
          processes.barrier("compiled")
          continue
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

        # Of every process's signals: all take the same number of steps.
        stopped = processes.any_process(stop)
        last = step >= config.steps or stopped
        saves = last or step % config.checkpoint_every == 0
        self._evaluate_and_save(state, step, iterator, saves=saves, last=last)
        if last:
          break
        batch = self._next(iterator)
    if stopped and step < config.steps:
      name = signal.Signals(stop[0]).name if stop else "signal elsewhere"
      logging.warning("%s: saved step %d and stopped", name, step)
    return state

  def _next(self, iterator) -> Any:
    return sharding.place_batch(next(iterator), self.program.mesh)

  def _compile(self, state, batch, room):
    """The step for this room, and how long it took to compile."""
    start = time.perf_counter()
    step = make_train_step(self.program, capacity=room.rows)
    compiled = step.lower(state, batch).compile()
    return compiled, time.perf_counter() - start

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
        self.program,
        self.program.model_of(state),
        TableStore(state.tables) if state.tables else None,
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
