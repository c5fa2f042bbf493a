"""Runs whose numbers are no longer finite: noticed, recorded, not repeated.

Nobody's input is wrong and nothing is broken, so it is an error of its own. A
run is a function of its config and its text: taken up again it would diverge
again. So its folder says that it has, and a restart is told so at once. Its
checkpoints are those from before, none is written of weights that are lost.
"""

import time
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from engram_jax.config_dicts import to_dict
from engram_jax.files import write_whole
from engram_jax.run_config import TrainConfig
from engram_jax.training import processes
from engram_jax.training.json_values import read_object, to_text
from engram_jax.training.runs import RunFolder
from engram_jax.training.state import TrainState

#: What usually helps, and what the message quotes of the config.
_FIELDS = ("learning_rate", "warmup_steps", "clip_norm")


class DivergedError(RuntimeError):
  """A run's loss, gradient or weights are no longer finite.

  The message says at which step, which checkpoint is the last good one, and
  what to try.
  """


def diverged(
  folder: RunFolder, train: TrainConfig, *, step: int, what: str
) -> NoReturn:
  """Records in the run's folder that it has diverged, and raises.

  Args:
    folder: the run's.
    train: the training part of its config.
    step: step at which it was noticed.
    what: which number is not finite.

  Raises:
    DivergedError: always.
  """
  fields = to_dict(train)
  found = {
    "step": step,
    "what": what,
    "fields": {name: fields[name] for name in _FIELDS},
    "date": time.strftime("%Y-%m-%d %H:%M:%S"),
  }
  if processes.is_main():
    write_whole(folder.diverged, to_text(found))
  raise DivergedError(_message(folder, found))


def require_none(folder: RunFolder) -> None:
  """Refuses to take up a run that has diverged.

  Raises:
    DivergedError: as when it did, and what lets it try again.
    InputError: a damaged record.
  """
  if folder.diverged.exists():
    found = read_object(folder.diverged, "diverged.json")
    again = f"; it would again: remove {folder.diverged} to let it try"
    raise DivergedError(_message(folder, found) + again)


def _message(folder: RunFolder, found: dict[str, Any]) -> str:
  steps = [x for x in folder.saved_steps() if x <= found.get("step", 0)]
  fields = found.get("fields", {})
  values = ", ".join(f"train.{name} = {x}" for name, x in fields.items())
  if steps:
    good = f"the last good checkpoint is step {steps[-1]}"
    start = f", from it: init_from={folder.path}, init_step={steps[-1]}"
  else:
    good, start = "there is no checkpoint from before", ""
  return (
    f"diverged at step {found.get('step')}: {found.get('what')}; {good}; try a "
    f"lower learning rate or a longer warm-up ({values}) in another "
    f"workdir{start}"
  )


@jax.jit
def weights_are_finite(state: TrainState) -> Bool[Array, ""]:
  """Whether parameters, balancing biases and tables are; one pass over them."""
  leaves = jax.tree.leaves((state.params, state.balance, state.tables))
  floats = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
  return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in floats]))
