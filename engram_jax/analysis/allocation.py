"""The trade of memory against experts, at equal total parameters.

  swap_memory_for_experts   a model with memory -> its rival with more experts
  swap_experts_for_memory   experts -> rows, up to a share 1 - rho of P_sparse

Both go as near to the same total as whole experts and prime table sizes allow,
and change nothing else; `swap_remainder` and `share_remainder` say how near.
"""

import dataclasses

from engram_jax.analysis.accounting import (
  count_parameters_by_part,
  counting_hash,
  sparsity,
)
from engram_jax.config import EngramConfig, ModelConfig
from engram_jax.errors import require
from engram_jax.memory.hashing import NgramHash


def swap_memory_for_experts(
  config: ModelConfig, hashing: NgramHash, *, equal_activated: bool = False
) -> ModelConfig:
  """The model whose routed experts take over the memory's parameters.

  The control of the paper's §3: equal total parameters, as near as a whole
  number of experts per block allows, with the size, the choice and the shared
  experts unchanged. `swap_remainder` tells what is left over.

  What a token activates then stays equal in the experts. It differs by what
  the memory itself activates, projections above all: nothing at the paper's
  size, some percent in a small model. `equal_activated` gives the leading
  dense blocks as much more width, so that the rival has the same work to do
  with.

  Args:
    config: a model with a memory and with experts.
    hashing: its hash.
    equal_activated: widen the dense blocks as said.

  Returns:
    The config without memory and with more experts.

  Raises:
    InputError: no memory, no block with experts, or no dense block to widen.
  """
  require(config.engram is not None, "engram", None, "a memory to swap")
  blocks = sum(config.is_moe(i) for i in range(config.num_layers))
  require(blocks > 0, "moe", config.moe, "one or more blocks with experts")
  size = config.hidden_size
  whole = count_parameters_by_part(config, hashing)
  plain = dataclasses.replace(config, engram=None)
  if equal_activated:
    dense = config.num_layers - blocks
    valid = "one or more dense blocks to widen"
    require(dense > 0, "num_dense_layers", config.num_dense_layers, valid)
    more = (
      whole["activated"] - count_parameters_by_part(plain, None)["activated"]
    )
    width = config.dense_size + round(more / (3 * size * dense))
    plain = dataclasses.replace(plain, dense_size=width)
  freed = whole["total"] - count_parameters_by_part(plain, None)["total"]
  # An expert in every block, with its columns of the routers.
  price = blocks * size * (3 * config.moe.expert_size + 1)
  added = (2 * freed + price) // (2 * price)  # the nearest whole number
  experts = config.moe.num_experts + added
  moe = dataclasses.replace(config.moe, num_experts=experts)
  return dataclasses.replace(plain, moe=moe)


def swap_remainder(config: ModelConfig, hashing: NgramHash) -> dict[str, int]:
  """Both sides of `swap_memory_for_experts`, and how far apart they are.

  Args:
    config: a model with a memory and with experts.
    hashing: its hash.

  Returns:
    `total_memory`, `total_experts`, `activated_memory`, `activated_experts`,
    and `remainder`, the parameters that the side with the memory has more (or,
    negative, fewer); at most half an expert in every block.

  Raises:
    InputError: as `swap_memory_for_experts`.
  """
  swapped = swap_memory_for_experts(config, hashing)
  return _sides(config, hashing, swapped)


def swap_experts_for_memory(
  config: ModelConfig, share: float, *, engram: EngramConfig | None = None
) -> ModelConfig:
  """The model in which memory has `share` of the sparse parameters.

  Eq. 7 of the paper: P_tot stays, and of P_sparse a part 1 - rho = `share` is
  memory. Routed experts are taken out (or put back) until the share is as near
  as a whole number of experts per block allows; the tables then get the rows
  that make the total equal, as nearly as primes allow. `share_remainder` tells
  what is left over.

  Args:
    config: a model with experts, with or without a memory.
    share: 1 - rho, above 0 and at most 1; at 1 only the experts that a token
      uses are left.
    engram: layers, orders, heads and width of the memory; the config's own if
      not given. Of its `rows_per_head` only the proportions count.

  Returns:
    The config with another number of experts, and a memory of other rows.

  Raises:
    InputError: no experts, no memory's layout, a share out of range, or
      experts too few to pay for the memory's projections and a row.
  """
  layout = engram or config.engram
  valid = "a memory's layout, here or in the config"
  require(layout is not None, "engram", None, valid)
  blocks = sum(config.is_moe(i) for i in range(config.num_layers))
  require(blocks > 0, "moe", config.moe, "one or more blocks with experts")
  require(0 < share <= 1, "share", share, "above 0 and at most 1")
  total = sparsity(config, counting_hash(config))["total"]

  def model(experts: int, rows: int) -> ModelConfig:
    """With so many experts, and rows of a head of the lowest order."""
    least = layout.rows_per_head[0]
    sizes = tuple(max(2, round(rows * n / least)) for n in layout.rows_per_head)
    memory = dataclasses.replace(layout, rows_per_head=sizes)
    moe = dataclasses.replace(config.moe, num_experts=experts)
    return dataclasses.replace(config, moe=moe, engram=memory)

  def tables(rows: int) -> int:
    hashing = counting_hash(model(config.moe.top_k, rows))
    return sum(hashing.num_rows.values()) * layout.head_dim

  # A model without a row and without an expert that a token leaves unread; to
  # each expert over that belong its columns of the routers.
  base = model(config.moe.top_k, 2)
  rest = sparsity(base, counting_hash(base))["total"] - tables(2)
  expert = blocks * config.hidden_size * 3 * config.moe.expert_size
  price = expert + blocks * config.hidden_size
  most = (total - rest - tables(2)) // price
  valid = "a model whose unread experts hold more than the memory's projections"
  require(most >= 0, "moe.num_experts", config.moe.num_experts, valid)
  read = len(layout.layers) * layout.memory_width

  def distance(unread: int) -> float:
    entries = total - rest - unread * price
    return abs((entries - read) / (entries - read + unread * expert) - share)

  unread = min(range(most + 1), key=distance)
  entries = total - rest - unread * price
  # The last number of rows whose tables are no larger, or the one after it.
  low, high = 2, 3 + entries // (read // len(layout.rows_per_head))
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if tables(middle) <= entries else (low, middle)
  rows = min((low, high), key=lambda n: abs(tables(n) - entries))
  return model(config.moe.top_k + unread, rows)


def share_remainder(
  config: ModelConfig, share: float, *, engram: EngramConfig | None = None
) -> dict[str, int | float]:
  """Both sides of `swap_experts_for_memory`, and how far apart they are.

  Args:
    config: as there, and so are the others.
    share: 1 - rho.
    engram: the memory's layout.

  Returns:
    As `swap_remainder`, the config's being the side of the experts; and
    `share`, what the memory has got.

  Raises:
    InputError: as `swap_experts_for_memory`.
  """
  swapped = swap_experts_for_memory(config, share, engram=engram)
  hashing = counting_hash(swapped)
  reached = sparsity(swapped, hashing)["memory_share"]
  return {**_sides(swapped, hashing, config), "share": reached}


def _sides(
  with_memory: ModelConfig, hashing: NgramHash, with_experts: ModelConfig
) -> dict[str, int]:
  memory = count_parameters_by_part(with_memory, hashing)
  experts = count_parameters_by_part(with_experts, counting_hash(with_experts))
  return {
    "total_memory": memory["total"],
    "total_experts": experts["total"],
    "activated_memory": memory["activated"],
    "activated_experts": experts["activated"],
    "remainder": memory["total"] - experts["total"],
  }
