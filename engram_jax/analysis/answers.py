"""How a model answers: right or wrong, how likely, and how far from another.

Teacher forcing: an answer is right if every token of it is the likeliest one
after the prompt and the true tokens before. A batch is that of a loss, whose
`loss_mask` marks the tokens of the answers (`data.synthetic.questions`).
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from engram_jax.backbone.transformer import Transformer
from engram_jax.memory.lookup import Tables
from engram_jax.memory.memory import Memory


class Answers(NamedTuple):
  """How likely a model finds the answers of a batch.

  Attributes:
    is_right: bool [B]; True also where nothing is asked.
    log_likelihood: float32 [B], of the whole answer, nats.
  """

  is_right: Bool[Array, "B"]
  log_likelihood: Float[Array, "B"]


@jax.jit
def score_answers(
  model: Transformer,
  memory: Memory | None,
  tables: Tables | None,
  batch: Mapping[str, Array],
) -> Answers:
  """Scores the answers that a batch asks for.

  Args:
    model: the transformer; its experts take every token.
    memory: the model's; None without one.
    tables: [R, d] per Engram layer; None turns the memory off.
    batch: `inputs`, `targets`, `breaks`, `loss_mask`, each [B, L].
  """
  log_p = _log_probabilities(model, memory, tables, batch)
  targets, is_asked = batch["targets"], batch["loss_mask"]
  of_target = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
  is_best = jnp.argmax(log_p, axis=-1) == targets
  return Answers(
    is_right=jnp.all(is_best | ~is_asked, axis=1),
    log_likelihood=jnp.sum(jnp.where(is_asked, of_target, 0), axis=1),
  )


@jax.jit
def answer_divergence(
  model: Transformer,
  tables: Tables | None,
  changed_model: Transformer,
  changed_tables: Tables | None,
  memory: Memory | None,
  batch: Mapping[str, Array],
) -> Float[Array, "B"]:
  """KL(before || after) of the answers' tokens: what a change did to them.

  Args:
    model: the transformer before.
    tables: its tables; None turns the memory off.
    changed_model: the transformer after.
    changed_tables: its tables.
    memory: that of both; None without one.
    batch: as for `score_answers`.

  Returns:
    float32 [B], nats per token of the answer, 0 where nothing is asked.
  """
  before = _log_probabilities(model, memory, tables, batch)
  after = _log_probabilities(changed_model, memory, changed_tables, batch)
  divergence = jnp.sum(jnp.exp(before) * (before - after), axis=-1)
  is_asked = batch["loss_mask"]
  total = jnp.sum(jnp.where(is_asked, divergence, 0), axis=1)
  return total / jnp.maximum(jnp.sum(is_asked, axis=1), 1)


def _log_probabilities(model, memory, tables, batch):
  rows = None
  if memory is not None and tables is not None:
    found = memory.lookup(tables, batch["inputs"], breaks=batch["breaks"])
    rows = found.rows
  out = model(
    batch["inputs"],
    rows,
    breaks=batch["breaks"],
    dispatch=model.config.exact_dispatch,
  )
  return jax.nn.log_softmax(out.logits, axis=-1)
