"""Frozen dataclasses that say what a run is: its data, training and devices.

As those of `config.py`, the model's: checked when they are made, saved with
every checkpoint. The configs of the experiments are in `experiments/configs/`.
"""

import dataclasses
import math

import numpy as np

from engram_jax.config import (
  ModelConfig,
  require_numbers,
  require_one_of,
  require_positive,
)
from engram_jax.errors import InputError, require

OPTIMIZERS = ("adamw", "muon")
LOOKUP_STRATEGIES = ("auto", "exchange", "gather")
TABLE_OPTIMIZERS = (
  "lazy_adam",
  "lazy_adam_row_steps",
  "dense_adam",
  "rowwise_adagrad",
  "sinkhorn",
)


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where the text comes from and how it is cut.

  Attributes:
    folder: folder of text files; empty for the Python standard library's own
      sources, which every machine has.
    glob: which files of the folder are text.
    tfds_name: a registered TFDS dataset instead of a folder; needs a network
      or a prepared `data_dir`.
    tfds_text_key: its feature that holds the text.
    data_dir: where prepared data are kept.
    vocab_size: size of the byte-level BPE tokenizer trained on the train split.
    validation_percent: share of the files held out, by hash of their path.
  """

  folder: str = ""
  glob: str = "*.py"
  tfds_name: str = ""
  tfds_text_key: str = "text"
  data_dir: str = "~/.cache/engram_jax"
  vocab_size: int = 8192
  validation_percent: int = 5

  def __post_init__(self):
    require_numbers(self)
    require(
      0 < self.validation_percent < 100,
      "validation_percent",
      self.validation_percent,
      "1 to 99",
    )
    require(
      self.vocab_size >= 258,
      "vocab_size",
      self.vocab_size,
      "at least 258: 256 bytes and two special tokens",
    )
    require(
      not (self.folder and self.tfds_name),
      "tfds_name",
      self.tfds_name,
      "empty when folder is given: one source of text",
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """One training run.

  Attributes:
    steps: optimizer steps.
    batch_size: sequences of one step, over all hosts.
    seq_len: L, tokens of one sequence.
    accumulation: microbatches whose gradients are summed into one step; must
      divide `batch_size`.
    learning_rate: peak of the backbone's schedule.
    warmup_steps: linear warm-up from 0.
    decay_points: shares of `steps` at which the rate drops (the paper: 80 %
      and 90 %).
    decay_factors: the rate from each of these points on, over the peak.
    optimizer: the backbone's: `adamw`, or `muon` for the matrices inside the
      blocks and AdamW for all else.
    muon_momentum: Muon's momentum, 0 to 1.
    weight_decay: decay of matrices; tables, norms and biases never decay.
    adam_b1: AdamW, and the tables' Adam.
    adam_b2: AdamW, and the tables' Adam.
    adam_eps: AdamW, and the tables' Adam.
    clip_norm: largest global norm of the gradients, rows included.
    loss_chunk: tokens of a device whose logits exist at a time; 0 for all.
    table_learning_rate_multiplier: the tables' rate over the backbone's.
    table_optimizer: `lazy_adam`, Adam on the rows that were touched;
      `lazy_adam_row_steps`, the same with a step count of each row's own in the
      bias correction; `dense_adam`, Adam on the whole table at every step: the
      oracle, for tables small enough to pay it; `rowwise_adagrad`, one number
      of state a row; `sinkhorn`, V4.1's balanced update, half of Adam's state.
      The last two take none of Adam's constants.
    on_nonfinite: `stop` the run, or `skip` the step and count it, when a loss
      or gradient is not finite. The step is never applied.
    eval_every: steps between evaluations; 0 for none.
    eval_batches: batches of one evaluation.
    checkpoint_every: steps between checkpoints.
    keep_last: newest checkpoints kept.
    keep_best: checkpoints of lowest evaluation loss kept besides.
    log_every: steps between records of metrics.
    seed: seed of the initial weights and of the data order.
  """

  steps: int
  batch_size: int
  seq_len: int
  accumulation: int = 1
  learning_rate: float = 4e-4
  warmup_steps: int = 2000
  decay_points: tuple[float, ...] = (0.8, 0.9)
  decay_factors: tuple[float, ...] = (0.316, 0.1)
  optimizer: str = "adamw"
  muon_momentum: float = 0.95
  weight_decay: float = 0.1
  adam_b1: float = 0.9
  adam_b2: float = 0.95
  adam_eps: float = 1e-8
  clip_norm: float = 1.0
  loss_chunk: int = 0
  table_learning_rate_multiplier: float = 5.0
  table_optimizer: str = "lazy_adam"
  on_nonfinite: str = "stop"
  eval_every: int = 100
  eval_batches: int = 20
  checkpoint_every: int = 100
  keep_last: int = 2
  keep_best: int = 1
  log_every: int = 1
  seed: int = 0

  def __post_init__(self):
    require_numbers(self)
    require_positive(self, "steps", "batch_size", "seq_len", "accumulation")
    require_positive(self, "learning_rate", "clip_norm", "checkpoint_every")
    require_positive(self, "keep_last", "log_every", "eval_batches", "adam_eps")
    require_positive(self, "table_learning_rate_multiplier")
    require_one_of(self, "on_nonfinite", ("stop", "skip"))
    require_one_of(self, "table_optimizer", TABLE_OPTIMIZERS)
    require(
      self.batch_size % self.accumulation == 0,
      "accumulation",
      self.accumulation,
      f"a divisor of batch_size = {self.batch_size}",
    )
    require_one_of(self, "optimizer", OPTIMIZERS)
    for name in (
      "warmup_steps",
      "eval_every",
      "keep_best",
      "weight_decay",
      "loss_chunk",
    ):
      require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
    for name in ("adam_b1", "adam_b2", "muon_momentum"):
      value = getattr(self, name)
      # Nearer to 1 float32 has no other number than 1.
      ok = 0 <= value < 1 and np.float32(value) < 1
      require(ok, name, value, "0 <= b < 1, and at most 1 - 2**-24")
    increasing = list(self.decay_points) == sorted(set(self.decay_points))
    require(
      increasing and all(0 < point < 1 for point in self.decay_points),
      "decay_points",
      self.decay_points,
      "increasing shares between 0 and 1",
    )
    fits = len(self.decay_factors) == len(self.decay_points)
    require(
      fits and all(0 < factor < math.inf for factor in self.decay_factors),
      "decay_factors",
      self.decay_factors,
      f"one factor above 0 for each of decay_points = {self.decay_points}",
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How a run is spread over its devices.

  Attributes:
    data: devices that split the batch, and parameters with their optimizer's
      state; 0 for as many as the others leave.
    expert: devices that split the batch, and the routed experts.
    tensor: devices that split hidden widths.
    replica: devices that split the batch and nothing else; 0 for as many as the
      others leave. On a TPU, parts of less than 8 rows or 128 columns travel
      badly: `data` is best no larger than the widths allow.
    lookup: how rows travel. `exchange`: each distinct row by all-to-all,
      within a capacity; `gather`: ids to all devices, rows by reduce-scatter,
      for few ids; `auto` chooses by their number.
    lookup_capacity: rows that one device may ask of another in one exchange,
      over the mean without duplicates, of which text has many. A batch that
      needs more is found out and run again with room for it: none is ever left
      out.
  """

  data: int = 0
  expert: int = 1
  tensor: int = 1
  replica: int = 1
  lookup: str = "auto"
  lookup_capacity: float = 1.0

  def __post_init__(self):
    require_numbers(self)
    require_positive(self, "expert", "tensor", "lookup_capacity")
    require(self.data >= 0, "data", self.data, ">= 0; 0 for what is left")
    valid = ">= 0; 0 for what is left, if data is not"
    ok = self.replica >= 0 and self.data + self.replica > 0
    require(ok, "replica", self.replica, valid)
    require_one_of(self, "lookup", LOOKUP_STRATEGIES)


#: All devices split the batch.
DEFAULT_MESH = MeshConfig()


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
  """A whole run: the model, its data, its training and its devices."""

  model: ModelConfig
  data: DataConfig
  train: TrainConfig
  mesh: MeshConfig = DEFAULT_MESH

  def __post_init__(self):
    if self.model.vocab_size < self.data.vocab_size:
      raise InputError(
        "model.vocab_size",
        self.model.vocab_size,
        f"at least the tokenizer's, data.vocab_size = {self.data.vocab_size}",
      )
