"""A process that saves is killed many times; nothing it leaves is wrong."""

import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
from flax import nnx

import engram_jax
from engram_jax.training.checkpoints import Checkpoints
from engram_jax.training.state import TrainState

KILLED = """
import os, random, signal, sys, time, traceback
import jax, jax.numpy as jnp, numpy as np, optax
from flax import nnx
from engram_jax.memory.row_sparse import row_sparse
from engram_jax.training.checkpoints import Checkpoints
from engram_jax.training.state import TrainState

def child(finished):
  params = nnx.State({"w": nnx.Param(jnp.zeros((300, 300)))})
  table = jnp.zeros((20000, 16))
  state = TrainState(
    step=jnp.zeros((), jnp.int32), params=params, balance=nnx.State({}),
    opt_state=optax.adamw(1.0).init(params), tables={1: table},
    table_states={1: row_sparse(optax.scale_by_adam()).init(table)})
  advance = jax.jit(
    lambda tree: jax.tree.map(lambda x: x + jnp.ones_like(x), tree),
    donate_argnums=0)
  with Checkpoints(sys.argv[1], keep_last=1, keep_best=1) as checkpoints:
    steps = checkpoints.steps()
    assert max(steps, default=0) >= finished, "a finished save was lost"
    for step in steps:
      restored = checkpoints.restore(state, step=step)
      for leaf in jax.tree.leaves(restored):
        assert (np.asarray(leaf) == step).all()
    state = restored if steps else state
    for step in range(max(steps, default=0), 200):
      state = advance(state)
      checkpoints.save(
        step + 1, state, run_metadata={}, eval_loss=float(step % 5))
      # `save` waits for the one before, which must stay from here on.
      os.write(write, bytes([step]))

# Forked after the imports and before JAX has started a thread.
rng, finished = random.Random(0), 0
for trial in range(int(sys.argv[2]) + 1):
  read, write = os.pipe()
  pid = os.fork()
  if not pid:
    try:
      child(finished)
    except BaseException:
      traceback.print_exc()
    os._exit(3)
  os.close(write)
  try:
    for _ in range(rng.randrange(1, 5)):
      finished = max(os.read(read, 1))
    time.sleep(rng.uniform(0, 0.2))
  finally:
    os.kill(pid, signal.SIGKILL)
  assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "ended before the kill"
  finished = max([finished, *os.read(read, 256)])
  os.close(read)
"""


def test_killed_at_any_moment(tmp_path):
  # Every child reads what the killed one before it has left.
  root = pathlib.Path(engram_jax.__file__).parent.parent
  trials = 6
  done = subprocess.run(
    [sys.executable, "-W", "ignore", "-c", KILLED, tmp_path, str(trials)],
    env=os.environ | {"PYTHONPATH": str(root)},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  with Checkpoints(tmp_path, keep_last=1, keep_best=1) as checkpoints:
    latest = checkpoints.latest_step()
    assert latest >= trials
    empty = nnx.State({})
    state = TrainState(
      step=jnp.asarray(latest + 1),
      params=empty,
      balance=empty,
      opt_state=(),
      tables={},
      table_states={},
    )
    checkpoints.save(latest + 1, state, run_metadata={}, eval_loss=9.0)
    checkpoints.wait()
    steps = checkpoints.steps()
  # What the killed ones had left is gone.
  assert len(steps) <= 2
  assert {path.name for path in tmp_path.iterdir()} == set(map(str, steps))
