"""The batches of a run: those it trains on, and those it is evaluated on."""

from collections.abc import Iterator

import grain
import jax
import numpy as np

from engram_jax.data.pipeline import batches, held_out_batches
from engram_jax.data.prepared import PreparedData
from engram_jax.run_config import ExperimentConfig, TrainConfig


def training_batches(
  train: TrainConfig, data: PreparedData
) -> grain.IterDataset:
  """This process's part of every batch that a run trains on, in its order.

  Args:
    train: config of the training.
    data: the prepared text.
  """
  return batches(
    data,
    "train",
    seq_len=train.seq_len,
    batch_size=train.batch_size,
    seed=train.seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )


def evaluation_batches(
  config: ExperimentConfig, data: PreparedData
) -> Iterator[dict[str, np.ndarray]]:
  """The same first batches of the validation split at every evaluation.

  Args:
    config: config of the run.
    data: its prepared text.
  """
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
