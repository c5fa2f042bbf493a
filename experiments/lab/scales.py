"""How large the studies are: `smoke` for the tests, `cpu`, `gpu`.

A scale is a model without a memory, the layout of the memory that is traded
against its experts, and how long and how often it is trained. What a study
changes, it changes from here.
"""

import dataclasses

from engram_jax.analysis.allocation import swap_experts_for_memory
from engram_jax.config import (
  AttentionConfig,
  EngramConfig,
  ModelConfig,
  MoEConfig,
)
from engram_jax.errors import require
from engram_jax.run_config import TrainConfig

#: The memory's share 1 - rho of the sparse parameters that the paper finds
#: best, and that every study but the first takes.
SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class Scale:
  """Sizes of the runs.

  Attributes:
    name: `smoke`, `cpu` or `gpu`.
    model: the model without a memory; all its sparse parameters are experts.
    layout: layers, orders, heads and width of the memory; of its rows only the
      proportions count.
    small_experts: routed experts of the smaller of two budgets; 0 for one
      budget alone.
    batch_size: sequences of one step.
    seq_len: L, tokens of one sequence.
    tokens: lengths of training in tokens, ascending.
    seeds: seeds of every comparison.
    pilot_seeds: seeds of the pilot, which no comparison uses; none for none.
    shares: the memory's shares of the sparse parameters that are compared.
    learning_rates: rates that are tried without a memory.
    corpus_bytes: bytes of text that are gathered, at most; each byte once.
    eval_windows: windows of an evaluation, spread over the whole split.
  """

  name: str
  model: ModelConfig
  layout: EngramConfig
  small_experts: int
  batch_size: int
  seq_len: int
  tokens: tuple[int, ...]
  seeds: tuple[int, ...]
  pilot_seeds: tuple[int, ...]
  shares: tuple[float, ...]
  learning_rates: tuple[float, ...]
  corpus_bytes: int
  eval_windows: int

  def train(
    self, tokens: int, *, seed: int, learning_rate: float
  ) -> TrainConfig:
    """The training of a run.

    Args:
      tokens: length, rounded down to whole steps.
      seed: seed of the weights and of the order of the text.
      learning_rate: peak of the schedule.
    """
    steps = tokens // (self.batch_size * self.seq_len)
    return TrainConfig(
      steps=steps,
      batch_size=self.batch_size,
      seq_len=self.seq_len,
      learning_rate=learning_rate,
      warmup_steps=max(1, steps // 20),
      eval_every=0,
      eval_batches=1,
      checkpoint_every=max(steps // 4, 50),
      keep_last=1,
      keep_best=0,
      log_every=max(steps // 100, 1),
      seed=seed,
    )

  def with_memory(
    self, share: float = SHARE, *, model: ModelConfig | None = None, **changes
  ) -> ModelConfig:
    """The model with experts exchanged for a memory, at equal parameters.

    Args:
      share: the memory's share of the sparse parameters; 0 for none.
      model: the model without a memory; the scale's own by default.
      **changes: fields of `EngramConfig` to be replaced in the layout.
    """
    model = model or self.model
    if not share:
      return model
    layout = dataclasses.replace(self.layout, **changes)
    return swap_experts_for_memory(model, share, engram=layout)


def _scale(name, *, size, blocks, vocab, experts, rows, **sizes) -> Scale:
  model = ModelConfig(
    vocab_size=vocab,
    hidden_size=size,
    num_layers=blocks,
    attention=AttentionConfig(
      num_heads=max(size // 16, 2),
      nope_dim=16,
      rope_dim=8,
      value_dim=24,
      kv_rank=size // 2,
    ),
    dense_size=3 * size,
    moe=MoEConfig(
      num_experts=experts,
      top_k=2,
      expert_size=size // 2,
      num_shared=1,
      # While routing is unbalanced, buckets would drop the experts' tokens, and
      # the comparison would favour the memory.
      dispatch="dropless",
      # Ten and a hundred times the paper's: these runs are short.
      balance_rate=0.01,
      balance_loss=0.01,
    ),
  )
  layout = EngramConfig(
    hidden_size=size,
    layers=(1,),
    rows_per_head=(rows, rows),
    heads=4,
    head_dim=size // 8,
    pad_id=0,
  )
  return Scale(
    name=name,
    model=model,
    layout=layout,
    **sizes,
  )


SCALES = {
  scale.name: scale
  for scale in (
    _scale(
      "smoke",
      size=32,
      blocks=2,
      vocab=512,
      experts=24,
      rows=64,
      small_experts=0,
      batch_size=4,
      seq_len=32,
      tokens=(1024,),
      seeds=(0,),
      pilot_seeds=(),
      shares=(0.0, 0.25, 0.9),
      learning_rates=(4e-3,),
      corpus_bytes=100_000,
      eval_windows=8,
    ),
    _scale(
      "cpu",
      size=64,
      blocks=4,
      vocab=2048,
      experts=64,
      rows=1024,
      small_experts=32,
      batch_size=16,
      seq_len=128,
      tokens=(250_000, 750_000, 2_250_000),
      seeds=(0, 1, 2),
      pilot_seeds=(101, 102),
      shares=(0.0, 0.1, 0.25, 0.5, 0.9),
      learning_rates=(2e-3, 4e-3, 8e-3),
      corpus_bytes=24_000_000,
      eval_windows=512,
    ),
    _scale(
      "gpu",
      size=512,
      blocks=8,
      vocab=8192,
      experts=64,
      rows=8192,
      small_experts=32,
      batch_size=64,
      seq_len=512,
      tokens=(6_000_000, 25_000_000, 100_000_000),
      seeds=(0, 1, 2),
      pilot_seeds=(101, 102),
      shares=(0.0, 0.1, 0.25, 0.5, 0.9),
      learning_rates=(5e-4, 1e-3, 2e-3),
      corpus_bytes=2_000_000_000,
      eval_windows=1024,
    ),
  )
}


def scale_of(name: str) -> Scale:
  """The scale of a name.

  Raises:
    InputError: no such scale.
  """
  require(name in SCALES, "scale", name, f"one of {', '.join(SCALES)}")
  return SCALES[name]
