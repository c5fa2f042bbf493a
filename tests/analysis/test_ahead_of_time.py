"""Programs compiled for devices that are not here."""

import importlib.metadata
import json
import os
import sys

import jax
import jax.numpy as jnp
import pytest

from engram_jax.analysis.ahead_of_time import (
  compile_for,
  hbm_gib,
  tpu_devices,
)
from engram_jax.errors import InputError

X = jax.ShapeDtypeStruct((8, 4), jnp.float32)


@pytest.mark.parametrize("topology", ["v9z:2x2", "v5p", ""])
def test_refuses_slices_that_there_are_not(topology):
  with pytest.raises(InputError, match=f"^topology: {topology}; valid: one of"):
    tpu_devices(topology)


def test_says_that_libtpu_is_missing(monkeypatch):
  def version(name):
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, "version", version)
  with pytest.raises(
    InputError, match=r"4x4x8 without libtpu; valid: installe"
  ):
    tpu_devices("v5p:4x4x8")


def test_memory_of_a_chip():
  assert hbm_gib("v5p:4x4x8") == 95
  assert hbm_gib("cpu:8") is None


def test_compiles_from_shapes_alone():
  executable, about = compile_for("cpu", jax.jit(jnp.tanh), X)
  assert about["fits"] and json.loads(json.dumps(about)) == about
  steps = ("trace_seconds", "lower_seconds", "compile_seconds")
  assert all(about[name] > 0 for name in steps)
  assert executable(jnp.zeros((8, 4))).shape == (8, 4)


class Refusing:
  """A jitted function whose compiler logs, and then says no."""

  def __init__(self, error):
    self.error = error

  def trace(self, *arguments):
    return self

  def lower(self, lowering_platforms):
    return self

  def compile(self):
    os.write(2, b"the compiler's log\n")
    print("how far it is", file=sys.stderr, flush=True)
    raise jax.errors.JaxRuntimeError(self.error)


def test_what_does_not_fit_is_told_and_not_raised(capfd):
  function = Refusing("RESOURCE_EXHAUSTED: no room\nat all")
  executable, about = compile_for("tpu", function, X)
  assert executable is None and not about["fits"]
  assert about["refusal"] == "RESOURCE_EXHAUSTED: no room"
  assert about["largest_temporaries"] == []
  # The log is kept, and what Python says meanwhile is not.
  assert capfd.readouterr().err == "how far it is\n"


def test_other_failures_are_raised_with_the_log(capfd):
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
    compile_for("tpu", Refusing("INTERNAL: a defect"), X)
  assert "the compiler's log" in capfd.readouterr().err
