"""Loss and perplexity of a checkpoint on held-out text, or on any folder.

  python -m experiments.evaluate --workdir=runs/tiny
  python -m experiments.evaluate --workdir=runs/tiny \
    --folder=notes --glob='*.md'
  python -m experiments.evaluate --workdir=runs/tiny \
    --store=file:runs/tiny/memory.rows

Three lines for a model with memory: as trained; with the memory off; and with
every position reading the rows of another one.

Of a --folder the first tokens are read, about 130,000 (--batches=0 for all, and
to their last one). Its documents come in an order of no meaning, so that they
are a fair sample.
"""

import dataclasses
import math
from typing import Any

from absl import flags

from engram_jax import progress
from engram_jax.data.folders import printable
from engram_jax.data.pipeline import held_out_batches, windows
from engram_jax.data.prepared import PreparedData, prepare
from engram_jax.errors import InputError, require
from engram_jax.training.companions import require_own_text
from engram_jax.training.evaluation import MEMORY_MODES, losses_by_memory
from engram_jax.training.runs import RunFolder, TrainedModel
from experiments import cli, stores
from experiments.results import require_place, write_result

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint; the newest if not set.")
_SPLIT = flags.DEFINE_string(
  "split", None, "train, validation or all; validation, or all of a --folder."
)
_FOLDER = flags.DEFINE_string("folder", "", "Other text than the run's own.")
_GLOB = flags.DEFINE_string("glob", "*", "Which files of --folder are text.")
_BATCHES = flags.DEFINE_integer(
  "batches",
  None,
  "At most so many; 0 for all. If not set: all of the run's validation text, "
  "and about 130,000 tokens of anything else.",
)
_OUT = flags.DEFINE_string("out", "", "Also write the figures to this JSON.")
_STORE = stores.define_store()
_PREFETCH = stores.define_prefetch()
flags.mark_flag_as_required("workdir")

#: Tokens that are read of a text which can be of any size.
TOKENS = 2**17


def evaluate(
  workdir: str,
  *,
  step: int | None = None,
  split: str | None = None,
  folder: str = "",
  glob: str = "*",
  max_batches: int | None = None,
  prefetch: bool = True,
  **store_options: Any,
) -> dict:
  """Figures of one checkpoint on one text; arguments as the flags.

  What is not named here says where the rows live: see `stores.load`.
  """
  valid = "0 for all, or more"
  require(
    max_batches is None or max_batches >= 0, "batches", max_batches, valid
  )
  trained, store = stores.load(workdir, step=step, **store_options)
  data_config, train = trained.config.data, trained.config.train
  if folder:
    data_config = dataclasses.replace(
      data_config, folder=folder, glob=glob, tfds_name=""
    )
  run_folder = RunFolder.of(workdir)
  split = split or ("all" if folder else "validation")
  data = prepare(
    data_config,
    tokenizer_path=run_folder.tokenizer,
    exclude=[run_folder.path],
    # A text that is read whole needs no part held out.
    both_splits=not (folder and split == "all"),
    progress=True,
  )
  if not folder:
    _require_own_text(trained, data)
  options = dict(seq_len=train.seq_len, tail=True if folder else None)
  found = windows(data, split, **options)
  present = -(-found.windows // train.batch_size)
  if max_batches is None:
    tokens = train.batch_size * train.seq_len
    own = split == "validation" and not folder
    max_batches = 0 if own else -(-TOKENS // tokens)
  most = min(max_batches or present, present)
  modes = MEMORY_MODES if trained.memory else MEMORY_MODES[:1]
  if most < present:
    line = f"The first {most:,} of {present:,} batches; --batches=0 reads all"
    progress.say(line)

  with progress.counting(
    "Evaluating", total=most * len(modes), unit="batches"
  ) as advance:

    def batches():
      for batch in held_out_batches(
        data, split, batch_size=train.batch_size, most=most, **options
      ):
        yield batch
        advance(1)

    losses = losses_by_memory(
      trained.setup,
      trained.model,
      store,
      batches,
      prefetch=prefetch,
    )
  return {
    "workdir": str(workdir),
    "step": trained.step,
    "split": split,
    "text": printable(folder) if folder else "the run's own",
    "batches": most,
    "batches_present": present,
    "loss": losses,
    "perplexity": {name: _perplexity(loss) for name, loss in losses.items()},
  }


def _perplexity(loss: float) -> float | None:
  """None beyond the largest number: JSON has no infinity."""
  try:
    return math.exp(loss)
  except OverflowError:
    return None


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
    progress.say(line)


def main(argv) -> None:
  del argv
  out = require_place(_OUT.value) if _OUT.value else None
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
    (
      f"memory {name}",
      f"{loss:.4f} nats per token, perplexity "
      + ("over 1e308" if p is None else f"{p:.2f}"),
    )
    for (name, loss), p in zip(
      found["loss"].items(), found["perplexity"].values()
    )
  ]
  title = f"{found['split']} split, step {found['step']}, {found['text']}"
  print(cli.table(rows, title))
  if out is not None:
    write_result(out, found)


if __name__ == "__main__":
  cli.run(main)
