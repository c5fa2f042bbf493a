"""The forward pass of decoding: its own loop over the blocks, with caches.

A step is the same function as the whole sequence, on explicit caches: the
attention's latents and the short convolution's last inputs. It comes in two
parts, so that whoever compiles them apart keeps the device busy while rows are
fetched:

  lower_blocks   embedding, blocks below the first Engram layer
  upper_blocks   the rest of the model, which needs the rows

`verify_blocks` takes the place of the second for tokens that are only guessed:
it has logits at all of them, and forgets those that do not stay.

Each sequence of the batch is one document.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from engram_jax.backbone.attention import LatentCache
from engram_jax.backbone.layer_groups import num_lower_blocks
from engram_jax.backbone.transformer import Context, require_rows_of
from engram_jax.decoding.weights import DecodingModel
from engram_jax.fusion.engram import Engram, init_conv_state
from engram_jax.fusion.over_encoding import OverEncoding
from engram_jax.fusion.short_conv import ConvState
from engram_jax.types import Hidden, Rows, TokenIds


class ModelCache(NamedTuple):
  """What the model keeps of the past; one document per sequence.

  Attributes:
    lengths: int32 [B], number of tokens so far.
    attention: one `LatentCache` per block.
    conv: per Engram layer, the convolution's state (None without one).
  """

  lengths: Int[Array, "B"]
  attention: tuple[LatentCache, ...]
  conv: dict[int, ConvState | None]


def init_cache(model: DecodingModel, batch: int, capacity: int) -> ModelCache:
  """An empty cache for `batch` sequences of at most `capacity` tokens.

  Args:
    model: the model to decode with.
    batch: B, number of sequences.
    capacity: most tokens of one sequence.
  """
  config, memory = model.config, model.config.engram
  layers = () if memory is None else memory.layers
  return ModelCache(
    lengths=jnp.zeros(batch, jnp.int32),
    attention=tuple(
      block.attention.init_cache(batch, capacity, config.dtype)
      for block in model.blocks
    ),
    conv={layer: init_conv_state(memory, batch) for layer in layers},
  )


def lower_blocks(
  model: DecodingModel, cache: ModelCache, token_ids: TokenIds
) -> tuple[Hidden, ModelCache]:
  """The part of a step that needs no rows.

  Args:
    model: the transformer.
    cache: the past.
    token_ids: int32 [B, L], padded on the right with any ids.

  Returns:
    The residual streams, and the cache, in which the blocks so far hold these
    tokens; `lengths` does not count them yet.
  """
  streams = model.outer.embed(token_ids)
  below = range(num_lower_blocks(model.config))
  return _through(model, below, streams, cache)


def upper_blocks(
  model: DecodingModel,
  streams: Hidden,
  cache: ModelCache,
  rows: Mapping[int, Rows] | None,
  lengths: Int[Array, "B"],
) -> tuple[Float[Array, "B V"], ModelCache]:
  """The part of a step from the first Engram layer on.

  Args:
    model: the transformer.
    streams: from `lower_blocks`.
    cache: from `lower_blocks`.
    rows: [B, L, K, d] per Engram layer; None turns the memory off.
    lengths: int32 [B], 1 to L: how many of the L tokens are real.

  Returns:
    float32 [B, V], logits after each sequence's last real token, and the
    cache with the real tokens.

  Raises:
    InputError: rows of other layers than the model's.
  """
  config = model.config
  require_rows_of(config, rows)
  above = range(num_lower_blocks(config), config.num_layers)
  streams, cache = _through(model, above, streams, cache, rows, lengths)
  hidden = model.outer.unembed(streams, at=lengths - 1)
  logits = model.outer.logits(hidden)[:, 0]
  return logits, cache._replace(lengths=cache.lengths + lengths)


def verify_blocks(
  model: DecodingModel,
  streams: Hidden,
  cache: ModelCache,
  rows: Mapping[int, Rows] | None,
  keep: Callable[[Float[Array, "B L V"]], tuple[Int[Array, "B"], Any]],
) -> tuple[Any, ModelCache]:
  """As `upper_blocks`, where the logits say how many of the tokens stay.

  Nothing is left of those that do not: a slot of the attention's cache is
  written again before it is read, and the convolution's state is cut where the
  tokens that stay end.

  Args:
    model: the transformer.
    streams: from `lower_blocks`.
    cache: from `lower_blocks`.
    rows: [B, L, K, d] per Engram layer; None turns the memory off.
    keep: from float32 logits [B, L, V], after every token, to int32 [B], how
      many of each sequence's L tokens stay (0 to L), and anything else.

  Returns:
    What else `keep` returned, and the cache with the tokens that stay.

  Raises:
    InputError: rows of other layers than the model's.
  """
  config = model.config
  require_rows_of(config, rows)
  above = range(num_lower_blocks(config), config.num_layers)
  fused = {}
  streams, ahead = _through(model, above, streams, cache, rows, fused=fused)
  logits = model.outer.logits(model.outer.unembed(streams))
  kept, found = keep(logits)
  # To the compiler the second fusion is the first but for where it is cut.
  conv = {
    layer: _engram(model, layer)
    .fuse(before, rows[layer], state=cache.conv[layer], lengths=kept)
    .state
    for layer, before in fused.items()
  }
  ahead = ahead._replace(lengths=cache.lengths + kept, conv=cache.conv | conv)
  return found, ahead


def _engram(model: DecodingModel, layer: int) -> Engram | OverEncoding:
  config = model.config.engram
  return model.outer.engrams[config.layers.index(layer)]


def _through(
  model: DecodingModel,
  numbers: range,
  streams: Hidden,
  cache: ModelCache,
  rows: Mapping[int, Rows] | None = None,
  lengths: Int[Array, "B"] | None = None,
  fused: dict[int, Hidden] | None = None,
) -> tuple[Hidden, ModelCache]:
  """The streams and the cache after these blocks and their Engram layers.

  Into `fused`, where one is given, go the streams before each Engram layer.
  """
  config = model.config
  positions = cache.lengths[:, None] + jnp.arange(streams.shape[1])
  context = Context(positions, dispatch=config.exact_dispatch)
  attention, conv = list(cache.attention), dict(cache.conv)
  for i in numbers:
    if rows is not None and i in rows:
      if fused is not None:
        fused[i] = streams
      engram = _engram(model, i)
      fusion = engram.fuse(streams, rows[i], state=conv[i], lengths=lengths)
      streams, conv[i] = streams + fusion.update, fusion.state
    streams, attention[i], _ = model.blocks[i](
      streams, context, cache=attention[i]
    )
  return streams, cache._replace(attention=tuple(attention), conv=conv)
