"""Trains a model, shows what came out: the loss, the gates, a sample.

  python -m experiments.pretrain --config=experiments/configs/tiny.py \
    --workdir=runs/tiny

Started again on the same workdir it goes on where it stopped.

With --init_from=WORKDIR a new run starts from the weights of another one, with
a config of its own: for text eight times as long, after training on 4,096
tokens, one with train.seq_len = 32768 and model.attention.yarn = YarnConfig().

On several hosts, or as several processes on one, start it once for each with

  --coordinator=HOST:PORT --num_processes=N --process_id=I

or, in a cluster that JAX knows, with --distributed; the workdir is shared.
If one is lost the others end; start them all again.
"""

import math
import pathlib

import jax
import numpy as np
from absl import flags

from engram_jax.analysis.accounting import count_parameters_by_part
from engram_jax.analysis.gates import gate_map, token_texts
from engram_jax.analysis.plots import plot_gates, plot_loss
from engram_jax.data.pipeline import windows
from engram_jax.data.tokenizers import END_ID, require_text
from engram_jax.decoding.generate import generate_all
from engram_jax.files import write_whole
from engram_jax.stores.program_stores import TableStore
from engram_jax.training import divergence, processes
from engram_jax.training.batches import evaluation_batches
from engram_jax.training.evaluation import losses_by_memory
from engram_jax.training.json_values import read_object, to_text
from engram_jax.training.loop import RunResult, run
from engram_jax.training.metrics import read_metrics
from experiments import cli

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_INIT_FROM = flags.DEFINE_string(
  "init_from", None, "Folder of a run whose weights a new one starts from."
)
_INIT_STEP = flags.DEFINE_integer(
  "init_step", None, "Its checkpoint; the newest by default."
)
_PROMPT = flags.DEFINE_string("prompt", "def main(", "Start of the sample.")
_START_PROCESSES = cli.define_processes()
flags.mark_flags_as_required(["config", "workdir"])

#: Tokens of the snippet whose gates are drawn, and of the sample.
SNIPPET, SAMPLE = 240, 120


def summarize(config, result: RunResult) -> dict:
  """Losses with and without memory, parameters, speed."""
  model, memory = result.setup.merge_model(result.state), result.setup.memory
  held_out = list(evaluation_batches(config, result.data))
  tables = result.state.tables
  store = TableStore(tables) if tables else None
  losses = losses_by_memory(result.setup, model, store, lambda: held_out)
  return {
    "step": int(result.state.step),
    "validation_loss": losses,
    "parameters": count_parameters_by_part(
      config.model, memory and memory.hashing
    ),
    **speed(result),
  }


def speed(result: RunResult) -> dict:
  """Figures of the training; of an earlier call if this one took no step."""
  names = ("tokens_per_second", "compile_seconds", "skipped_steps")
  if result.steps_taken:
    return {name: getattr(result, name) for name in names}
  path = result.folder.path / "summary.json"
  if path.exists():
    before = read_object(path, "summary.json")
    if isinstance(before.get("tokens_per_second"), float):
      return {name: before.get(name) for name in names}
  # Killed between its last step and its summary: what the record has.
  trained = read_metrics(result.folder.metrics, "train")
  compiled = read_metrics(result.folder.metrics, "run")
  rates = [record["tokens_per_second"] for record in trained]
  return {
    "tokens_per_second": float(np.median(rates)) if rates else None,
    "compile_seconds": compiled[-1]["compile_seconds"] if compiled else None,
    "skipped_steps": sum(not record["finite"] for record in trained),
  }


def draw_loss(result: RunResult) -> None:
  """The loss curve."""
  folder = result.folder
  plot_loss(
    read_metrics(folder.metrics, "train"),
    read_metrics(folder.metrics, "eval"),
    folder.path / "loss.png",
  )


def draw_gates(result: RunResult) -> None:
  """The gates over a snippet of held-out text, if there is a memory."""
  if result.setup.memory is None:
    return
  seq_len = min(
    SNIPPET,
    result.setup.train.seq_len,
    result.data.splits["validation"].tokens - 1,
  )
  tokens = windows(result.data, "validation", seq_len=seq_len).read(0, seq_len)
  gates = gate_map(
    result.setup.merge_model(result.state),
    result.setup.memory,
    result.state.tables,
    tokens,
  )
  texts = token_texts(result.data.tokenizer, tokens)
  plot_gates(texts, gates, result.folder.path / "gates.png")


def sample(result: RunResult, prompt: str) -> str:
  """A continuation of `prompt`, prompt included."""
  tokenizer, tables = result.data.tokenizer, result.state.tables
  (tokens,) = generate_all(
    result.setup.merge_model(result.state),
    result.setup.memory,
    TableStore(tables) if tables else None,
    [tokenizer.encode(prompt).ids],
    max_new_tokens=SAMPLE,
    key=jax.random.key(0),
    temperature=0.7,
    top_p=0.95,
    end_id=END_ID,
    vocab_size=tokenizer.get_vocab_size(),
  )
  return prompt + tokenizer.decode(tokens)


def _figure(number: float | None, unit: str) -> str:
  return "not known" if number is None else f"{number:,.1f} {unit}"


def main(argv) -> None:
  del argv
  config = cli.frozen(_CONFIG.value)
  require_text("prompt", _PROMPT.value)  # before the work, not after it
  result = run(
    config,
    _WORKDIR.value,
    init_from=_INIT_FROM.value,
    init_step=_INIT_STEP.value,
  )
  talks = processes.is_main()
  if not result.finished:
    if talks:
      print(f"stopped at step {int(result.state.step)}; run again to continue")
    return
  folder = result.folder.path
  summary = summarize(config, result)
  loss = summary["validation_loss"]["on"]
  if not math.isfinite(loss):
    what = f"the validation loss is {loss}"
    divergence.diverged(
      result.folder, config.train, step=summary["step"], what=what
    )
  if not talks:
    return
  draw_loss(result)
  summary_path = pathlib.Path(folder / "summary.json")
  write_whole(summary_path, to_text(summary))
  if processes.count() == 1:
    draw_gates(result)
    text = sample(result, _PROMPT.value)
    write_whole(folder / "sample.txt", text + "\n")
    print(f"\nA sample ({folder / 'sample.txt'}):\n\n{text}\n")
  else:
    # They need the whole model on one host.
    print(
      "No gates and no sample here. For a sample, on one host: "
      f"python -m experiments.generate --workdir={folder}"
    )
  losses, parts = summary["validation_loss"], summary["parameters"]
  names = {"on": "with memory", "off": "memory off", "shuffled": "wrong rows"}
  rows = [
    (f"validation loss, {names[mode]}", f"{loss:.4f} nats per token")
    for mode, loss in losses.items()
  ]
  rows += [
    ("parameters", f"{parts['total']:,}"),
    ("  of them in tables", f"{parts['tables']:,}"),
    ("  activated per token", f"{parts['activated']:,}"),
    ("training speed", _figure(summary["tokens_per_second"], "tokens/s")),
    ("first step's compilation", _figure(summary["compile_seconds"], "s")),
    ("everything is in", str(folder)),
  ]
  print(cli.table(rows, f"Step {summary['step']}"))


if __name__ == "__main__":
  cli.run(main, start_processes=_START_PROCESSES)
