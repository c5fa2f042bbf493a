"""Loss and perplexity of a checkpoint on held-out text, or on any folder.

  python -m experiments.evaluate --workdir=runs/tiny
  python -m experiments.evaluate --workdir=runs/tiny \
    --folder=notes --glob='*.md'
  python -m experiments.evaluate --workdir=runs/tiny \
    --store=file:runs/tiny/memory.rows

Three lines for a model with memory: as trained; with the memory off; and with
every position reading the rows of another one.
"""

import dataclasses
import json
import math
import pathlib
import sys
from typing import Any

from absl import flags

from engram_jax.data.pipeline import held_out_batches, windows
from engram_jax.data.prepared import PreparedData, prepare
from engram_jax.errors import InputError, require
from engram_jax.files import write_whole
from engram_jax.training.companions import require_own_text
from engram_jax.training.evaluation import MEMORY_MODES, losses_by_memory
from engram_jax.training.runs import RunFolder, TrainedModel
from experiments import cli, progress, stores

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint; the newest if not set.")
_SPLIT = flags.DEFINE_string(
  "split", None, "train, validation or all; validation, or all of a --folder."
)
_FOLDER = flags.DEFINE_string("folder", "", "Other text than the run's own.")
_GLOB = flags.DEFINE_string("glob", "*", "Which files of --folder are text.")
_BATCHES = flags.DEFINE_integer("batches", 0, "At most so many; 0 for all.")
_OUT = flags.DEFINE_string("out", "", "Also write the figures to this JSON.")
_STORE = stores.define_store()
_PREFETCH = stores.define_prefetch()
flags.mark_flag_as_required("workdir")


def evaluate(
  workdir: str,
  *,
  step: int | None = None,
  split: str | None = None,
  folder: str = "",
  glob: str = "*",
  max_batches: int = 0,
  prefetch: bool = True,
  **store_options: Any,
) -> dict:
  """Figures of one checkpoint on one text; arguments as the flags.

  What is not named here says where the rows live: see `stores.load`.
  """
  require(max_batches >= 0, "batches", max_batches, "0 for all, or more")
  trained, store = stores.load(workdir, step=step, **store_options)
  data_config, train = trained.config.data, trained.config.train
  if folder:
    data_config = dataclasses.replace(
      data_config, folder=folder, glob=glob, tfds_name=""
    )
  tokenizer_path = RunFolder(pathlib.Path(workdir).expanduser()).tokenizer
  data = prepare(data_config, tokenizer_path=tokenizer_path)
  if not folder:
    _require_own_text(trained, data)
  split = split or ("all" if folder else "validation")
  sizes = {"seq_len": train.seq_len, "batch_size": train.batch_size}
  multiple_of = {"multiple_of": train.batch_size}
  found = windows(data, split, seq_len=train.seq_len, **multiple_of)
  count = len(found) // train.batch_size
  count = min(count, max_batches or count)
  modes = len(MEMORY_MODES) if trained.hashing else 1
  tokens = count * train.batch_size * train.seq_len
  progress.say(
    f"{count:,} batches of {train.batch_size} x {train.seq_len} tokens,"
    f" {tokens:,} in all, {modes} times"
  )
  with progress.counting(
    "evaluating", total=modes * count, unit="batches"
  ) as shown:

    def batches():
      for batch in held_out_batches(
        data, split, most=max_batches or None, **sizes
      ):
        yield batch
        shown.update()

    losses = losses_by_memory(
      trained.program,
      trained.model,
      trained.tables,
      batches,
      store=store,
      prefetch=prefetch,
    )
  return {
    "workdir": str(workdir),
    "step": trained.step,
    "split": split,
    "text": folder or "the run's own",
    "loss": losses,
    "perplexity": {name: math.exp(loss) for name, loss in losses.items()},
  }


def _require_own_text(trained: TrainedModel, data: PreparedData) -> None:
  """Refuses text that has changed since the run, and says what is unknown."""
  config = trained.config.data
  try:
    unknown = require_own_text(trained.text_digests, data, config)
  except InputError as error:
    valid = f"{error.valid}; --folder takes any text"
    raise InputError(error.field, error.value, valid) from None
  if unknown:
    line = f"not known to the checkpoint, and not compared: {unknown} text"
    print(line, file=sys.stderr)


def main(argv) -> None:
  del argv
  found = evaluate(
    _WORKDIR.value,
    step=_STEP.value,
    split=_SPLIT.value,
    folder=_FOLDER.value,
    glob=_GLOB.value,
    max_batches=_BATCHES.value,
    prefetch=_PREFETCH.value,
    **_STORE(),
  )
  rows = [
    (f"memory {name}", f"{loss:.4f} nats per token, perplexity {p:.2f}")
    for (name, loss), p in zip(
      found["loss"].items(), found["perplexity"].values()
    )
  ]
  title = f"{found['split']} split, step {found['step']}, {found['text']}"
  print(cli.table(rows, title))
  if _OUT.value:
    path = pathlib.Path(_OUT.value).expanduser()
    write_whole(path, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
  cli.run(main)
