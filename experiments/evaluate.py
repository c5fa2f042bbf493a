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
from typing import Any

from absl import flags

from engram_jax.data.pipeline import held_out_batches
from engram_jax.data.prepared import prepare
from engram_jax.errors import require
from engram_jax.files import write_whole
from engram_jax.training.evaluation import losses_by_memory
from engram_jax.training.runs import RunFolder
from experiments import cli, stores

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
  split = split or ("all" if folder else "validation")
  losses = losses_by_memory(
    trained.program,
    trained.model,
    store,
    lambda: held_out_batches(
      data,
      split,
      seq_len=train.seq_len,
      batch_size=train.batch_size,
      most=max_batches or None,
    ),
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
