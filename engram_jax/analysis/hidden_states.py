"""Hidden states at every depth: what the paper's §5 looks at."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from engram_jax.backbone.transformer import Transformer
from engram_jax.types import Breaks, Hidden, Rows, TokenIds


def hidden_states(
  model: Transformer,
  rows: Mapping[int, Rows] | None,
  token_ids: TokenIds,
  *,
  breaks: Breaks | None = None,
) -> Float[Array, "depths B L D"]:
  """The sum of the residual streams before the first block and after each.

  It is what the last norm and the head would read if the model ended there.
  No expert drops a token, so that none depends on its neighbours in the batch.

  Args:
    model: the transformer, of n blocks.
    rows: [B, L, K, d] per Engram layer; None turns the memory off.
    token_ids: int32 [B, L].
    breaks: [B, L] of `Break`.

  Returns:
    [n + 1, B, L, D], in the model's compute dtype: entry 0 is the embedding.
  """

  def summed(streams: Hidden) -> Float[Array, "B L D"]:
    return jnp.sum(streams, axis=2)

  output = model(
    token_ids,
    rows,
    breaks=breaks,
    dispatch=model.config.exact_dispatch,
    logits=False,
    observe=summed,
  )
  first = summed(model.embed(token_ids))
  return jnp.concatenate([first[None], output.observed])
