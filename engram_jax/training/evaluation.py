"""The loss of a text, with the memory on, off, or reading the wrong rows."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from engram_jax.backbone.transformer import Transformer
from engram_jax.errors import require
from engram_jax.memory.retrieval import Tables, read_rows, shuffle_row_ids
from engram_jax.training.step import Batch, Program, cross_entropy

#: How an evaluation uses the memory.
MEMORY_MODES = ("on", "off", "shuffled")

EvalStep = Callable[[Transformer, Tables, Batch], tuple[Array, Array]]


def make_eval_step(program: Program, *, memory: str = "on") -> EvalStep:
  """A jitted function of model, tables and batch: (sum of losses, targets).

  Args:
    program: whose hash and compression read the tables.
    memory: "on"; "off", no Engram layer adds anything; "shuffled", every
      position reads the rows of another one, so that they are real rows that
      mean nothing here.

  Raises:
    InputError: an unknown memory mode.
  """
  valid = f"one of {', '.join(MEMORY_MODES)}"
  require(memory in MEMORY_MODES, "memory", memory, valid)

  def evaluate(model: Transformer, tables: Tables, batch: Batch):
    rows = None
    if program.hashing is not None and memory != "off":
      rows, row_ids = program.read(tables, batch)
      if memory == "shuffled":
        row_ids = shuffle_row_ids(jax.random.key(0), row_ids)
        rows = read_rows(tables, row_ids)
    moe = program.model.moe
    # Dropless, or the loss of a text would depend on its batch.
    dispatch = "ragged" if moe and moe.dispatch == "ragged" else "dropless"
    out = model(
      batch["inputs"], rows, breaks=batch["breaks"], dispatch=dispatch
    )
    mask = batch["loss_mask"]
    return cross_entropy(out.logits, batch["targets"], mask), jnp.sum(mask)

  return jax.jit(evaluate)


def mean_loss(
  eval_step: EvalStep,
  model: Transformer,
  tables: Tables,
  batches: Iterable[Batch],
) -> float:
  """Nats per token over batches, every target counted once.

  Args:
    eval_step: from `make_eval_step`.
    model: the transformer.
    tables: [R, d] per Engram layer.
    batches: with masked padding or without.

  Raises:
    InputError: no target in any batch.
  """
  total, targets = 0.0, 0
  for batch in batches:
    losses, count = jax.device_get(eval_step(model, tables, batch))
    total, targets = total + float(losses), targets + int(count)
  require(targets > 0, "batches", "no target", "at least one target")
  return total / targets
