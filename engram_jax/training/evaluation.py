"""The loss of a text, with the memory on, off, or reading the wrong rows."""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from engram_jax import sharding
from engram_jax.backbone.transformer import Transformer
from engram_jax.errors import require
from engram_jax.memory.retrieval import Tables, shuffle_row_ids
from engram_jax.training.losses import model_loss
from engram_jax.training.program import Batch, Program

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

  @functools.partial(jax.jit, static_argnames="capacity")
  def evaluate(model, tables, batch, *, capacity):
    with sharding.use(program.mesh):
      row_ids = {} if memory == "off" else program.row_ids(batch)
      if row_ids and memory == "shuffled":
        row_ids = shuffle_row_ids(jax.random.key(0), row_ids)
      read = program.read(tables, row_ids, capacity=capacity)
      loss, _ = model_loss(
        model,
        read.rows,
        batch,
        chunk=program.train.loss_chunk,
        dispatch=program.model.dropless_dispatch,
      )
      needed = 0 if read.plan is None else read.plan.needed
      return loss, jnp.sum(batch["loss_mask"]), needed

  def step(model: Transformer, tables: Tables, batch: Batch):
    nonlocal room
    batch = sharding.place_batch(batch, program.mesh)
    room = room or program.capacity(batch)
    while True:
      *result, needed = evaluate(model, tables, batch, capacity=room.rows)
      if room.rows is None or room.suffices(jax.device_get(needed)):
        return tuple(result)

  room = None
  return step


def losses_by_memory(
  program: Program,
  model: Transformer,
  tables: Tables,
  batches: Callable[[], Iterable[Batch]],
) -> dict[str, float]:
  """`mean_loss` with the memory used in each of `MEMORY_MODES`.

  Args:
    program: what was trained; one without a memory has the mode "on" alone.
    model: the transformer.
    tables: [R, d] per Engram layer.
    batches: gives the same batches at each call.
  """
  return {
    memory: mean_loss(
      make_eval_step(program, memory=memory), model, tables, batches()
    )
    for memory in (MEMORY_MODES if program.hashing else ("on",))
  }


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
