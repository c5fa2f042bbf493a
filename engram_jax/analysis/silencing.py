"""What each prediction loses when the memory is silenced (§5, "Sensitivity").

The loss of every target with the memory on, off, and reading the rows of other
positions; the same text, the same weights. What is lost says how far the model
depends on its memory, which is not what the memory adds: for that, a model
without one is needed.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float32, Shaped

from engram_jax.backbone.transformer import Transformer
from engram_jax.errors import require
from engram_jax.memory.lookup import Tables, lookup_rows, shuffle_row_ids
from engram_jax.memory.memory import Memory
from engram_jax.training.evaluation import MEMORY_MODES
from engram_jax.types import Rows


class TokenScores(NamedTuple):
  """How each target was predicted.

  Attributes:
    loss: float32 [...], nats.
    correct: bool [...], whether no other token had a higher probability.
    gates: float32 [..., G] per Engram layer, of the position that predicts;
      empty when the memory is off.
  """

  loss: Float32[Array | np.ndarray, "*shape"]
  correct: Bool[Array | np.ndarray, "*shape"]
  gates: dict[int, Float32[Array | np.ndarray, "*shape G"]]


@nnx.jit
def token_scores(
  model: Transformer,
  rows: Mapping[int, Rows] | None,
  batch: Mapping[str, Array],
) -> TokenScores:
  """The scores [B, L] of a batch, its masked positions included.

  Args:
    model: the transformer; no expert drops a token.
    rows: [B, L, K, d] per Engram layer; None turns the memory off.
    batch: `inputs`, `targets` and `breaks`, each [B, L].
  """
  output = model(
    batch["inputs"],
    rows,
    breaks=batch["breaks"],
    dispatch=model.config.exact_dispatch,
  )
  targets = batch["targets"]
  loss = optax.softmax_cross_entropy_with_integer_labels(output.logits, targets)
  correct = jnp.argmax(output.logits, axis=-1) == targets
  return TokenScores(loss, correct, output.gates)


def rows_by_mode(
  memory: Memory, tables: Tables, batch: Mapping[str, Array], *, mode: str
) -> dict[int, Rows] | None:
  """The rows that a batch reads with the memory so used.

  Args:
    memory: the model's.
    tables: [R, d] per Engram layer.
    batch: `inputs` and `breaks`, each [B, L].
    mode: one of `evaluation.MEMORY_MODES`.

  Raises:
    InputError: another mode.
  """
  valid = f"one of {', '.join(MEMORY_MODES)}"
  require(mode in MEMORY_MODES, "mode", mode, valid)
  if mode == "off":
    return None
  row_ids = memory.row_ids(batch["inputs"], breaks=batch["breaks"])
  if mode == "shuffled":
    row_ids = shuffle_row_ids(jax.random.key(0), row_ids)
  return lookup_rows(tables, row_ids).rows


def scores_by_mode(
  model: Transformer,
  memory: Memory | None,
  tables: Tables,
  batches: Iterable[Mapping[str, Array | np.ndarray]],
) -> dict[str, TokenScores]:
  """The scores of all targets of a text, with the memory in each mode.

  Args:
    model: the transformer.
    memory: its memory; None, for a model without, has the mode "on" alone.
    tables: [R, d] per Engram layer; empty without a memory.
    batches: `inputs`, `targets`, `breaks` and `loss_mask`, each [B, L].

  Returns:
    By mode, on the host: scores [n] of the n positions of the text that the
    mask leaves, in its order.

  Raises:
    InputError: no batch.
  """
  modes = MEMORY_MODES if memory is not None else ("on",)
  found: dict[str, list] = {mode: [] for mode in modes}
  for batch in batches:
    batch = jax.tree.map(jnp.asarray, dict(batch))
    keep = np.asarray(batch["loss_mask"])
    for mode in modes:
      rows = None
      if memory is not None:
        rows = rows_by_mode(memory, tables, batch, mode=mode)
      scores = jax.device_get(token_scores(model, rows, batch))
      found[mode].append(jax.tree.map(lambda x, k=keep: x[k], scores))
  require(found["on"], "batches", "none", "one or more")
  return {
    mode: jax.tree.map(lambda *x: np.concatenate(x), *parts)
    for mode, parts in found.items()
  }


def mean_by_group(
  values: Shaped[np.ndarray, "n"], groups: Shaped[np.ndarray, "n"]
) -> dict[str, float]:
  """Mean of the values in each group, by its name; groups in sorted order.

  Args:
    values: numbers or booleans.
    groups: name or number of the group of each value.
  """
  names, members = np.unique(groups, return_inverse=True)
  counts = np.bincount(members)
  sums = np.bincount(members, weights=values.astype(np.float64))
  return {str(name): float(mean) for name, mean in zip(names, sums / counts)}
