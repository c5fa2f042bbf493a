"""A second signal ends a process that does not answer, wherever it waits."""

import signal
import subprocess
import sys
import time

import pytest

WAITING = """
import sys, time
import jax, jax.numpy as jnp
from engram_jax.training.stopping import second_signal_ends, stop_requests

def block(x):
  print("waiting", flush=True)
  time.sleep(600)
  return x

with stop_requests():
  f = jax.jit(lambda x: jax.pure_callback(block, x, x))
  f(jnp.zeros(())).block_until_ready()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_a_process_that_waits_inside_jax(number):
  process = subprocess.Popen(
    [sys.executable, "-c", WAITING],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(number)
    process.send_signal(number)  # as `timeout` does: one request
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
  finally:
    process.kill()
  assert process.returncode == 128 + number
  assert "a second signal" in err and "Traceback" not in err
