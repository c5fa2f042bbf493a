"""The training loop: data in, steps, evaluations, checkpoints, metrics out.

A run is its folder (`runs.py`). Started on the folder of the same run it goes
on from the newest checkpoint, bit for bit as if it had never stopped. SIGTERM
and SIGINT end it after the step in progress with a checkpoint; a second one
ends it at once (`stopping.py`). No other run gets into the folder meanwhile.

A run whose numbers are no longer finite has diverged (`divergence.py`): it ends
with what it had saved before, and is not taken up again by the same command.

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
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np
import tqdm
from absl import logging
from jax.sharding import Mesh

from engram_jax import sharding
from engram_jax.data.prepared import PreparedData, prepare
from engram_jax.errors import (
  InputError,
  NonFiniteError,
  first_line,
  require,
)
from engram_jax.memory.hashing import NgramHash
from engram_jax.run_config import ExperimentConfig
from engram_jax.stores.program_stores import TableStore
from engram_jax.training import divergence, processes
from engram_jax.training.batches import (
  evaluation_batches,
  training_batches,
)
from engram_jax.training.checkpoints import Checkpoints
from engram_jax.training.companions import (
  require_own_files,
  require_own_text,
  text_digests,
)
from engram_jax.training.evaluation import mean_loss
from engram_jax.training.init_from import (
  find_source,
  init_state_from,
  record_source,
  tokenizer_of,
)
from engram_jax.training.locks import locked
from engram_jax.training.metrics import MetricsWriter
from engram_jax.training.run_metadata import (
  difference,
  make_run_metadata,
  read_run_metadata,
  require_same_run,
)
from engram_jax.training.runs import (
  RunFolder,
  make_memory,
  open_folder,
  save_tokenizer_of_run,
)
from engram_jax.training.setup import TrainSetup
from engram_jax.training.state import TrainState
from engram_jax.training.step import make_train_step
from engram_jax.training.stopping import stop_requests


@dataclasses.dataclass(frozen=True, eq=False)
class RunResult:
  """What a call of `run` did.

  Attributes:
    folder: where everything is.
    state: at the end.
    setup: what was trained.
    data: the prepared text.
    finished: False when a signal ended the run early.
    compile_seconds: seconds that compiling the training step took.
    steps_taken: by this call; 0 if the run had ended before.
    tokens_per_second: over this call's steps, without evaluations,
      checkpoints and compilation; None if it took none.
    skipped_steps: steps of this call that were not applied, as not finite.
  """

  folder: RunFolder
  state: TrainState
  setup: TrainSetup
  data: PreparedData
  finished: bool
  compile_seconds: float
  steps_taken: int
  tokens_per_second: float | None
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
      see `init_from.py`. Not looked at once the run has a checkpoint.
    init_step: step of the other run's checkpoint; None for the newest.
    progress: tell on standard error what is done, with a progress bar.

  Raises:
    InputError: a folder of another run, data or weights that do not fit.
    DivergedError: the run's numbers are no longer finite, or were not when it
      ended the last time.
    ProcessLostError: another process of the run is gone.
  """
  train = config.train
  progress = progress and processes.is_main()
  say = _say if progress else lambda line: None
  mesh = processes.on_all_processes(lambda: _make_mesh(config))
  if mesh is not None:
    say(f"Devices: {', '.join(f'{a} {n}' for a, n in mesh.shape.items())}")
  source = find_source(
    workdir, config, init_from=init_from, init_step=init_step
  )
  with contextlib.ExitStack() as stack:
    folder = processes.on_all_processes(
      lambda: _enter(workdir, config, stack), main_first=True
    )
    processes.on_all_processes(lambda: divergence.require_none(folder))
    say("Preparing the text (done once for each text and tokenizer) ...")
    tokenizer_path = tokenizer_of(folder, source)
    if tokenizer_path is not None:
      say(f"The tokenizer comes with the weights: {tokenizer_path}")
    data = processes.on_all_processes(
      lambda: prepare(
        config.data,
        tokenizer_path=tokenizer_path,
        exclude=[folder.path],
        progress=progress,
      ),
      main_first=True,
    )
    sizes = {name: f"{info.tokens:,}" for name, info in data.splits.items()}
    say(f"Tokens: {sizes['train']} to train on, {sizes['validation']} held out")
    memory, iterator, evaluation = processes.on_all_processes(
      lambda: _prepare_run(config, folder, data)
    )
    saved = Checkpoints(
      folder.checkpoints,
      keep_last=train.keep_last,
      keep_best=train.keep_best,
    )
    stack.push(_closing(saved))
    stack.enter_context(
      processes.reporting_lost_processes(lambda: _how_to_go_on(folder))
    )
    stored = None
    if saved.latest_step() is not None:
      stored = read_run_metadata(saved)
    known = stored or (source and source.run_metadata)
    if known and memory is not None and known["hash"] is not None:
      # The stored multipliers count, whatever this NumPy would draw.
      stored_hash = NgramHash.from_dict(known["hash"])
      memory = dataclasses.replace(memory, hashing=stored_hash)
    expected = make_run_metadata(
      config,
      memory,
      tokenizer=data.tokenizer,
      data_digest=data.splits["train"].digest,
      held_out_digest=data.splits["validation"].digest,
    )
    if stored is not None:
      processes.on_all_processes(
        lambda: _require_own(folder, stored, data, config)
      )
      require_same_run(stored, expected)
    elif source is not None:
      source.require_same(expected)
    processes.on_all_processes(lambda: _require_as_on_main(expected))
    setup = TrainSetup.create(
      config.model, train, memory, mesh=mesh, mesh_config=config.mesh
    )
    if stored is not None:
      state = saved.restore(setup.abstract_state(), data_iterator=iterator)
      say(f"Resuming {folder.path} at step {int(state.step)}")
      if init_from is not None:
        say(f"Not from {init_from}: the run has checkpoints of its own")
    elif source is not None:
      if processes.is_main():
        record_source(folder, source)
      say(f"Starting from step {source.step} of {source.folder.path}")
      state = init_state_from(source, setup)
    else:
      state = setup.init_state()

    writer = stack.enter_context(
      MetricsWriter(folder.path, enabled=processes.is_main())
    )
    loop = _Loop(config, folder, writer, saved, setup, evaluation, expected)
    stop = stack.enter_context(stop_requests())
    state = loop.train(state, iterator, stop=stop, progress=progress)
    saved.wait()
  return RunResult(
    folder=folder,
    state=state,
    setup=setup,
    data=data,
    finished=int(state.step) >= train.steps,
    compile_seconds=loop.compile_seconds,
    steps_taken=loop.steps,
    tokens_per_second=loop.tokens / loop.seconds if loop.tokens else None,
    skipped_steps=loop.skipped,
  )


def _enter(
  workdir: str | os.PathLike,
  config: ExperimentConfig,
  stack: contextlib.ExitStack,
) -> RunFolder:
  """The run's folder, held by process 0 until the stack ends."""
  folder = RunFolder.of(workdir)
  folder.require_usable()
  if processes.is_main():
    stack.enter_context(locked(folder.path))
    if not folder.config.exists():
      stack.push(_clearing_start(folder))
  return open_folder(workdir, config)


def _clearing_start(folder: RunFolder) -> Callable[..., None]:
  """What an `ExitStack` calls at its end, of a start in a new folder.

  A start that is refused leaves a folder that takes another config.
  """

  def clear(kind, error, trace) -> None:
    del error, trace
    if kind is None:
      return
    try:
      if not folder.has_begun():
        folder.clear_start()
    except (InputError, OSError) as failure:
      # What ended the start is what is to be told.
      logging.warning("%s not cleared: %s", folder.path, first_line(failure))

  return clear


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
  """Memory, iterator, held-out batches; the folder's tokenizer."""
  train = config.train
  require(
    data.vocab_size <= config.model.vocab_size,
    "model.vocab_size",
    config.model.vocab_size,
    f"at least the tokenizer's {data.vocab_size}",
  )
  memory = make_memory(config, data.tokenizer)
  if processes.is_main():
    save_tokenizer_of_run(folder, data.tokenizer_path, memory)
  iterator = iter(training_batches(train, data))
  evaluation = (
    list(evaluation_batches(config, data)) if train.eval_every else []
  )
  return memory, iterator, evaluation


def _require_own(folder, stored, data, config) -> None:
  """Refuses files or text that are not those of a checkpoint's run."""
  require_own_files(folder.tokenizer, folder.compression, stored)
  # Other text trains another tokenizer: say so, and not what follows from it.
  require_own_text(text_digests(stored), data, config.data)


def _require_as_on_main(expected: dict[str, Any]) -> None:
  """Refuses a process with other text, tokenizer or hash than process 0's."""
  other = difference(processes.from_main(expected), expected)
  if other is not None:
    me = jax.process_index()
    valid = f"{other.found}, as in process 0; process {me} has {other.expected}"
    raise InputError(other.field, other.expected, valid)


def _closing(saved: Checkpoints) -> Callable[..., None]:
  """What an `ExitStack` calls at its end."""

  def close(kind, error, trace) -> None:
    # What is being written cannot be finished without a lost process; Orbax
    # would wait for it for many minutes.
    if kind is None or not issubclass(kind, processes.ProcessLostError):
      saved.__exit__(kind, error, trace)

  return close


def _how_to_go_on(folder: RunFolder) -> str:
  """What to do after a loss. From the disk: Orbax may wait for the lost."""
  steps = folder.saved_steps()
  where = f"the last checkpoint (step {steps[-1]})" if steps else "the start"
  return f"start all processes again to continue from {where}"


def _say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


class _Loop:
  """One call of `run`: the steps, and what is counted on the way."""

  def __init__(
    self, config, folder, writer, saved, setup, evaluation, run_metadata
  ):
    self.train_config, self.folder = config.train, folder
    self.saved, self.setup = saved, setup
    self.evaluation, self.run_metadata = evaluation, run_metadata
    self.writer = writer
    self.compile_seconds = 0.0
    self.seconds = 0.0  # of steps alone
    self.steps = self.tokens = self.skipped = 0

  def train(self, state, iterator, *, stop, progress) -> TrainState:
    """Steps until the end or a signal; the state is consumed."""
    config, step = self.train_config, int(state.step)
    if step >= config.steps:
      return state
    batch = self._next(iterator)
    capacity = self.setup.lookup_capacity(batch)
    if progress:
      _say("Compiling the step ...")
    compiled, self.compile_seconds = self._compile(state, batch, capacity)
    # A collective waits half a minute only, for a slower compilation elsewhere.
    processes.barrier("compiled")
    self.writer.write(
      step, {"compile_seconds": self.compile_seconds}, kind="run"
    )

    with tqdm.tqdm(
      total=config.steps,
      initial=step,
      disable=not progress,
      unit="step",
      # Not a line every tenth of a second in a log.
      mininterval=0.1 if sys.stderr.isatty() else 10.0,
    ) as bar:
      while True:
        start = time.perf_counter()
        state, metrics = compiled(state, batch)
        # One small transfer a step: a step that is not finite must be the
        # last one, and one without room for its rows is taken again.
        metrics = processes.to_host(metrics)
        needed = metrics.get("lookup_needed", 0)
        if not capacity.suffices(needed):
          capacity = capacity.grown(needed)
          compiled, _ = self._compile(state, batch, capacity)
          processes.barrier("compiled")
          continue
        step += 1
        elapsed = time.perf_counter() - start
        self.seconds += elapsed
        self.steps += 1
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
    return sharding.place_batch(next(iterator), self.setup.mesh)

  def _compile(self, state, batch, capacity):
    """The step for this capacity, and how long it took to compile."""
    start = time.perf_counter()
    step = make_train_step(self.setup, capacity=capacity.rows)
    compiled = step.lower(state, batch).compile()
    return compiled, time.perf_counter() - start

  def _check_finite(self, step: int, metrics: dict) -> None:
    if metrics["finite"]:
      return
    names = ("loss", "grad_norm")
    name = next(n for n in names if not np.isfinite(metrics[n]))
    what = f"{name} is {metrics[name]}, and the step was not applied"
    if self.train_config.on_nonfinite == "stop":
      self.writer.write(step, metrics)
      self._diverged(step, what)
    self.skipped += 1
    logging.warning("step %d: %s", step, what)

  def _diverged(self, step: int, what: str) -> NoReturn:
    self.saved.wait()  # for the last good one, which the message names
    divergence.diverged(self.folder, self.train_config, step=step, what=what)

  def _evaluate_and_save(self, state, step, iterator, *, saves, last) -> None:
    every, loss = self.train_config.eval_every, None
    # A checkpoint competes for the best by a loss of its own step.
    if every and (step % every == 0 or saves):
      try:
        loss = mean_loss(
          self.setup,
          self.setup.merge_model(state),
          TableStore(state.tables) if state.tables else None,
          self.evaluation,
        )
      except NonFiniteError as error:
        self._diverged(step, f"the evaluation: {error}")
      self.writer.write(step, {"loss": loss}, kind="eval")
    if saves:
      if not processes.to_host(divergence.weights_are_finite(state)):
        self._diverged(step, "some weights are not finite")
      self.saved.save(
        step,
        state,
        data_iterator=iterator,
        run_metadata=self.run_metadata,
        eval_loss=loss,
      )
