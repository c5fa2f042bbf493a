"""The short convolution as shifted products, against `flax.nnx.Conv`.

Part of `engram_module`, which says at what sizes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from engram_jax.fusion.short_conv import short_conv
from experiments.benchmarks import harness

PASSES = ("forward", "forward + backward")


def contenders(*, taps: int, dilation: int, streams: int, hidden_size: int):
  """Two functions of x [B, L, G, D] and kernel [taps, G, D]; they agree."""
  channels = streams * hidden_size
  module = nnx.Conv(
    channels,
    channels,
    kernel_size=(taps,),
    kernel_dilation=(dilation,),
    padding="CAUSAL",
    feature_group_count=channels,
    use_bias=False,
    rngs=nnx.Rngs(0),
  )
  graph, weights = nnx.split(module)

  def shifted_products(x, kernel):
    return short_conv(x, kernel, dilation=dilation)[0]

  def flax_conv(x, kernel):
    flat = kernel.reshape(taps, 1, channels)
    conv = nnx.merge(graph, jax.tree.map(lambda _: flat, weights))
    return conv(x.reshape(*x.shape[:2], channels)).reshape(x.shape)

  return {"short_conv": shifted_products, "nnx.Conv": flax_conv}


def measure(
  *,
  batch: int,
  length: int,
  streams: int,
  hidden_size: int,
  taps: int,
  dilation: int,
  repeats: int,
) -> dict[str, Any]:
  """Times both forms on the same input, in turns.

  Returns:
    `records`, one per pass and form; `ratio`, per pass how many times as long
    `nnx.Conv` takes; `difference`, the largest one of the two outputs, over
    the largest output.
  """
  shape = (batch, length, streams, hidden_size)
  x, target = jax.random.normal(jax.random.key(0), (2, *shape))
  kernel = jax.random.normal(jax.random.key(1), (taps, *shape[2:]))
  forms = contenders(
    taps=taps, dilation=dilation, streams=streams, hidden_size=hidden_size
  )

  def backward(conv):
    def loss(x, kernel):
      return jnp.mean(conv(x, kernel) * target)

    # With the value: a convolution is linear, so that its gradient alone
    # would leave the forward pass out.
    return jax.value_and_grad(loss, argnums=(0, 1))

  cases = {}
  for name, conv in forms.items():
    for line, function in zip(PASSES, (conv, backward(conv)), strict=True):
      cases[line, name] = functools.partial(jax.jit(function), x, kernel)
  times = harness.interleaved(cases, repeats=repeats)
  ours, theirs = (cases["forward", name]() for name in forms)
  difference = jnp.max(jnp.abs(ours - theirs)) / jnp.max(jnp.abs(theirs))
  return {
    "records": [
      {"line": line, "form": name, **taken}
      for (line, name), taken in times.items()
    ],
    "ratio": {
      line: times[line, "nnx.Conv"]["median_ms"]
      / times[line, "short_conv"]["median_ms"]
      for line in PASSES
    },
    "difference": float(difference),
  }
