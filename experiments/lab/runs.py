"""Runs by name: trained once, measured once, shared by processes.

A run's digest is that of everything that determines it. Its checkpoint lies in
FOLDER/runs/DIGEST, what a study measured of it in FOLDER/records/STUDY/DIGEST:
finished ones are not repeated, and two processes with one folder share the work
(each run is claimed by a lock that ends with its process).
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array

from engram_jax import progress
from engram_jax.analysis.accounting import (
  count_parameters_by_part,
  counting_hash,
)
from engram_jax.backbone.transformer import Transformer
from engram_jax.config import ModelConfig
from engram_jax.config_dicts import to_dict
from engram_jax.data.pipeline import spread_batches
from engram_jax.data.prepared import PreparedData, prepare
from engram_jax.errors import InputError, NonFiniteError, require
from engram_jax.files import write_whole
from engram_jax.memory.memory import Memory
from engram_jax.run_config import DataConfig, ExperimentConfig
from engram_jax.stores.program_stores import TableStore
from engram_jax.training import loop
from engram_jax.training.divergence import DivergedError
from engram_jax.training.evaluation import mean_loss
from engram_jax.training.locks import locked
from engram_jax.training.metrics import read_metrics
from engram_jax.training.runs import RunFolder
from engram_jax.training.setup import TrainSetup
from engram_jax.training.stopping import StoppedError
from experiments.lab import corpora
from experiments.lab.scales import Scale
from experiments.results import COMMIT

#: Seconds between two looks at runs that another process has claimed.
POLL_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run of a study.

  Attributes:
    group: what is compared; the runs of a group differ in their seeds alone.
    config: everything that determines the training.
    labels: what the study wants to know of the run later, such as its share.
    init_from: digest of the run whose weights and tokenizer it starts from,
      and whose checkpoints were kept; empty for none.
    init_step: step of that run's checkpoint; None for its last.
  """

  group: str
  config: ExperimentConfig
  labels: dict[str, Any] = dataclasses.field(
    default_factory=dict, compare=False
  )
  init_from: str = ""
  init_step: int | None = None

  @property
  def seed(self) -> int:
    return self.config.train.seed

  @property
  def tokens(self) -> int:
    train = self.config.train
    return train.steps * train.batch_size * train.seq_len

  @property
  def digest(self) -> str:
    """Hex digest of config and start; of the text its name, not its place."""
    config = to_dict(self.config)
    data = config["data"]
    if data["folder"]:
      data["folder"] = pathlib.Path(data["folder"]).parent.name
    del data["data_dir"]
    if self.init_from:
      config["init_from"] = [self.init_from, self.init_step]
    text = json.dumps(config, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
  """A finished run, in the hands of a study.

  Attributes:
    run: what was trained.
    setup: see `TrainSetup`; its `memory` is None without one.
    model: the transformer.
    tables: [R, d] per Engram layer; empty without a memory.
    data: the text, with its tokenizer.
    folder: the run's folder, with `metrics.jsonl` and its checkpoint.
  """

  run: Run
  setup: TrainSetup
  model: Transformer
  tables: dict[int, Array]
  data: PreparedData
  folder: pathlib.Path

  @property
  def memory(self) -> Memory | None:
    return self.setup.memory

  @property
  def config(self) -> ExperimentConfig:
    return self.run.config


class Laboratory:
  """Trains and measures the runs of studies of one scale.

  Attributes:
    scale: sizes of the runs.
    folder: place of corpora, runs and records.
  """

  def __init__(self, scale: Scale, folder: pathlib.Path):
    self.scale, self.folder = scale, folder
    self._corpora: dict[str, corpora.Corpus] = {}

  # --- text ---

  def corpus(self, name: str) -> corpora.Corpus:
    """`code` or `prose`, gathered at the first call."""
    if name not in self._corpora:
      self._corpora[name] = corpora.gather(
        name,
        root=self.folder / "corpora",
        at_most=self.scale.corpus_bytes,
      )
    return self._corpora[name]

  def data_config(self, corpus: corpora.Corpus) -> DataConfig:
    """The data of a run on a corpus, with a tokenizer trained on it."""
    return DataConfig(
      folder=str(corpus.folder),
      glob="*.txt",
      data_dir=str(self.folder / "prepared"),
      vocab_size=self.scale.model.vocab_size,
    )

  def config(
    self,
    model: ModelConfig,
    *,
    tokens: int,
    seed: int,
    learning_rate: float,
    corpus: corpora.Corpus | None = None,
    **train: Any,
  ) -> ExperimentConfig:
    """The config of a run.

    Args:
      model: what is trained.
      tokens: length of the training.
      seed: seed of weights and order.
      learning_rate: peak of the schedule.
      corpus: what it reads; None for `code`.
      **train: fields of `TrainConfig` to be replaced.
    """
    training = self.scale.train(tokens, seed=seed, learning_rate=learning_rate)
    return ExperimentConfig(
      model=model,
      data=self.data_config(corpus or self.corpus("code")),
      train=dataclasses.replace(training, **train),
    )

  # --- training ---

  def train(self, run: Run) -> Trained:
    """Trains a run, goes on with it, or finds it trained.

    Raises:
      InputError: the text is shorter than the run: no token is seen twice.
      DivergedError: it has diverged.
      StoppedError: a signal has stopped it.
    """
    folder, source = self.folder / "runs" / run.digest, None
    if run.init_from:
      source = RunFolder.of(self.folder / "runs" / run.init_from)
    data = prepare(run.config.data, tokenizer_path=source and source.tokenizer)
    train = run.config.train
    have, valid = data.splits["train"].tokens, "a text that is longer"
    text = f"{run.tokens:,} of {have:,}: tokens would be seen twice"
    require(run.tokens + train.seq_len < have, "tokens", text, valid)
    result = loop.run(
      run.config,
      folder,
      init_from=source and source.path,
      init_step=run.init_step,
      progress=False,
    )
    if not result.finished:
      raise StoppedError("stopped; run again to continue")
    return Trained(
      run=run,
      setup=result.setup,
      model=result.setup.merge_model(result.state),
      tables=result.state.tables,
      data=result.data,
      folder=folder,
    )

  def losses(
    self, trained: Trained, *, modes: Sequence[str] = ("on",)
  ) -> dict[str, dict[str, float]]:
    """Nats per token by memory mode, on windows spread over held-out text.

    Args:
      trained: the model.
      modes: uses of the memory, of `MEMORY_MODES`.

    Returns:
      `validation` (the text's own held-out part) and `prose` (the second
      corpus, never trained on), each with the loss of every mode.
    """
    prose = dataclasses.replace(
      self.data_config(self.corpus("prose")), validation_percent=1
    )
    other = prepare(
      prose, tokenizer_path=trained.data.tokenizer_path, both_splits=False
    )
    return {
      "validation": self.losses_on(
        trained, trained.data, "validation", modes=modes
      ),
      "prose": self.losses_on(trained, other, "all", modes=modes),
    }

  def losses_on(
    self,
    trained: Trained,
    data: PreparedData,
    split: str,
    *,
    modes: Sequence[str] = ("on",),
  ) -> dict[str, float]:
    """Nats per token by memory mode, on windows spread over a split.

    Args:
      trained: the model.
      data: a text with the model's tokenizer.
      split: `train`, `validation` or `all`.
      modes: uses of the memory, of `MEMORY_MODES`.
    """
    train = trained.config.train

    def batches():
      return spread_batches(
        data,
        split,
        seq_len=train.seq_len,
        batch_size=train.batch_size,
        count=self.scale.eval_windows,
      )

    store = TableStore(trained.tables) if trained.tables else None
    return {
      mode: mean_loss(
        trained.setup, trained.model, store, batches(), memory=mode
      )
      for mode in modes
    }

  # --- measuring ---

  def measure_all(
    self,
    runs: Sequence[Run],
    measure: Callable[[Trained], dict[str, Any]],
    *,
    name: str,
    keep: bool = False,
  ) -> list[dict[str, Any]]:
    """The records of runs, in their order.

    Args:
      runs: what to train; equal ones are trained once.
      measure: what to find out of a trained run; JSON values.
      name: name of the measurement, part of the records' path.
      keep: leave the checkpoints where they are.

    Returns:
      Per run `group`, `labels`, `seed`, `tokens`, `parameters`, `seconds` and
      what was measured; or `diverged` and the reason in its place.
    """
    folder = self.folder / "records" / name
    waiting = {run.digest: run for run in runs}
    progress.say(self._left(name, folder, waiting))
    while waiting:
      before = len(waiting)
      for digest, run in [*waiting.items()]:
        if not (folder / f"{digest}.json").exists():
          if not self._measure_claimed(run, measure, folder, keep):
            continue  # another process is at it
          progress.say(self._left(name, folder, waiting))
        del waiting[digest]
      if waiting and len(waiting) == before:
        time.sleep(POLL_SECONDS)
    return self.records(runs, name=name)

  def records(self, runs: Sequence[Run], *, name: str) -> list[dict[str, Any]]:
    """The records that there are, in the order of the runs."""
    found = []
    for run in runs:
      path = self.folder / "records" / name / f"{run.digest}.json"
      if path.exists():
        record = json.loads(path.read_text())
        mine = {"group": run.group, "labels": run.labels}
        found.append({**record, **mine})
    return found

  def _left(self, name, folder, waiting) -> str:
    left = [
      run
      for digest, run in waiting.items()
      if not (folder / f"{digest}.json").exists()
    ]
    tokens = sum(run.tokens for run in left)
    return f"{name}: {len(left)} runs left, {tokens / 1e6:.1f} million tokens"

  def _measure_claimed(self, run, measure, folder, keep) -> bool:
    """Trains and measures a run, unless another process is at it."""
    with contextlib.ExitStack() as claim:
      try:
        claim.enter_context(locked(self.folder / "claims" / run.digest))
      except InputError:
        return False
      path = folder / f"{run.digest}.json"
      if not path.exists():  # it may have been made meanwhile
        path.parent.mkdir(parents=True, exist_ok=True)
        record = self._measured(run, measure)
        write_whole(path, json.dumps(record, indent=1) + "\n")
      if not keep:
        shutil.rmtree(self.folder / "runs" / run.digest, ignore_errors=True)
    return True

  def _measured(self, run, measure) -> dict[str, Any]:
    start = time.time()
    about = {
      "digest": run.digest,
      "seed": run.seed,
      "tokens": run.tokens,
      "parameters": count_parameters_by_part(
        run.config.model, counting_hash(run.config.model)
      ),
    }
    try:
      trained = self.train(run)
      found = measure(trained)
    except (DivergedError, NonFiniteError) as error:
      return {**about, "diverged": str(error)}
    rates = [
      record["tokens_per_second"]
      for record in read_metrics(trained.folder / "metrics.jsonl", "train")
    ]
    return {
      **about,
      **found,
      "seconds": round(time.time() - start, 1),
      "tokens_per_second": float(np.median(rates)),
      "commit": COMMIT,
    }


def by_group(
  records: Sequence[dict[str, Any]],
) -> dict[str, list[dict[str, Any]]]:
  """Records by group, in the order of their seeds, without diverged ones."""
  groups: dict[str, list[dict[str, Any]]] = {}
  for record in records:
    if "diverged" not in record:
      groups.setdefault(record["group"], []).append(record)
  return {
    name: sorted(found, key=lambda r: r["seed"])
    for name, found in groups.items()
  }


def matched(
  ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
  """Records of two groups side by side, for the seeds that both have."""
  other = {record["seed"]: record for record in theirs}
  return [(r, other[r["seed"]]) for r in ours if r["seed"] in other]
