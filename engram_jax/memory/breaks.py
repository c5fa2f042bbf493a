"""stub"""

import jax.numpy as jnp

from engram_jax.types import Break


def breaks_from_segments(segment_ids, positions=None, *, padding=0):
  first = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-7)
  b = jnp.where(segment_ids != first, Break.DOCUMENT_START, Break.NONE)
  if positions is not None:
    b = jnp.where(positions == 0, Break.DOCUMENT_START, b)
  return jnp.where(segment_ids == padding, Break.NON_TEXT, b).astype(jnp.int8)
