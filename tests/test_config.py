"""Configs: read and written without loss, refused with the field's name."""

import dataclasses
import json
import typing

import pytest

from engram_jax import config as configs
from engram_jax import run_config as run_configs
from engram_jax.config import (
  AttentionConfig,
  EngramConfig,
  ModelConfig,
  MoEConfig,
  YarnConfig,
)
from engram_jax.config_dicts import from_dict, to_dict
from engram_jax.errors import InputError
from engram_jax.run_config import (
  DataConfig,
  ExperimentConfig,
  MeshConfig,
  TrainConfig,
)

ENGRAM = {"hidden_size": 16, "layers": (1, 0), "rows_per_head": (11, 13)}
ATTENTION = {"num_heads": 2, "nope_dim": 8, "rope_dim": 4}
MOE = {"num_experts": 4, "top_k": 2, "expert_size": 8}
MODEL = {
  "vocab_size": 300,
  "hidden_size": 16,
  "num_layers": 2,
  "attention": AttentionConfig(**ATTENTION),
  "dense_size": 32,
}
DATA = {"vocab_size": 300}
TRAIN = {"steps": 10, "batch_size": 8, "seq_len": 16}
VALID = {
  EngramConfig: ENGRAM,
  AttentionConfig: ATTENTION,
  YarnConfig: {},
  MoEConfig: MOE,
  ModelConfig: MODEL
  | {"engram": EngramConfig(**ENGRAM), "moe": MoEConfig(**MOE)},
  DataConfig: DATA,
  TrainConfig: TRAIN,
  MeshConfig: {},
}


def experiment() -> ExperimentConfig:
  return ExperimentConfig(
    model=ModelConfig(**VALID[ModelConfig]),
    data=DataConfig(**DATA),
    train=TrainConfig(**TRAIN),
  )


# --- Reading and writing ---------------------------------------------------


@pytest.mark.parametrize("cls", VALID, ids=lambda cls: cls.__name__)
def test_round_trip(cls):
  config = cls(**VALID[cls])
  assert from_dict(cls, to_dict(config)) == config
  # As a checkpoint stores it.
  assert from_dict(cls, json.loads(json.dumps(to_dict(config)))) == config


def test_round_trip_of_a_whole_experiment():
  config = experiment()
  again = from_dict(ExperimentConfig, json.loads(json.dumps(to_dict(config))))
  assert again == config
  assert again.model.engram.layers == (1, 0)
  assert isinstance(again.model.engram, EngramConfig)


def test_round_trip_without_memory_and_experts():
  config = ModelConfig(**MODEL)
  values = to_dict(config)
  assert values["engram"] is None and values["moe"] is None
  assert from_dict(ModelConfig, values) == config


def test_to_dict_holds_plain_values():
  def check(value):
    if isinstance(value, dict):
      assert all(isinstance(key, str) for key in value)
      return all(map(check, value.values()))
    if isinstance(value, list):
      return all(map(check, value))
    return value is None or type(value) in (int, float, str, bool)

  values = to_dict(experiment())
  assert check(values)
  assert values["model"]["engram"]["layers"] == [1, 0]


def test_from_dict_takes_configs_and_integers_for_floats():
  model = from_dict(ModelConfig, MODEL | {"init_std": 1})
  assert model.attention is MODEL["attention"]
  assert type(model.init_std) is float


def test_configs_are_frozen_and_hashable():
  config = experiment()
  assert hash(config) == hash(experiment())
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.train.steps = 1


# --- What from_dict refuses -------------------------------------------------


def changed(path: str, value) -> dict:
  """A valid experiment's dict with one value changed."""
  values = to_dict(experiment())
  *groups, name = path.split(".")
  group = values
  for part in groups:
    group = group[part]
  group[name] = value
  return values


@pytest.mark.parametrize(
  "path, value, message",
  [
    ("trian", {}, "trian: unknown field; valid: did you mean train?"),
    (
      "train.learning_rat",
      1.0,
      "train.learning_rat: unknown field; valid: did you mean learning_rate?",
    ),
    (
      "model.engram.row_per_head",
      [3],
      "model.engram.row_per_head: unknown field; "
      "valid: did you mean rows_per_head?",
    ),
    # Nothing is near: all fields are named.
    (
      "model.moe.zzz",
      1,
      "model.moe.zzz: unknown field; valid: num_experts, top_k, expert_size, "
      "num_shared, dispatch, capacity_factor, balance_rate, balance_loss",
    ),
    ("model", 3, "model: 3; valid: a group of fields"),
    ("model", None, "model: None; valid: a group of fields"),
    ("train.steps", "10", "train.steps: '10'; valid: int"),
    ("train.steps", 10.0, "train.steps: 10.0; valid: int"),
    ("train.steps", True, "train.steps: True; valid: int"),
    ("train.steps", None, "train.steps: None; valid: int"),
    (
      "train.learning_rate",
      "4e-4",
      "train.learning_rate: '4e-4'; valid: float",
    ),
    ("train.learning_rate", True, "train.learning_rate: True; valid: float"),
    ("data.glob", 3, "data.glob: 3; valid: str"),
    ("model.tie_embeddings", 1, "model.tie_embeddings: 1; valid: bool"),
    (
      "model.engram.layers",
      1,
      "model.engram.layers: 1; valid: a sequence of numbers",
    ),
    (
      "model.engram.layers",
      "01",
      "model.engram.layers: 01; valid: a sequence of numbers",
    ),
    (
      "model.engram.layers",
      [0, 1.5],
      "model.engram.layers[1]: 1.5; valid: int",
    ),
    (
      "train.decay_points",
      [0.5, "0.9"],
      "train.decay_points[1]: '0.9'; valid: float",
    ),
    (
      "model.engram.conv_dilation",
      1.5,
      "model.engram.conv_dilation: 1.5; valid: int",
    ),
    # Refused by the dataclass itself: the path is still the whole one.
    (
      "model.moe.top_k",
      5,
      "model.moe.top_k: 5; valid: at most num_experts = 4",
    ),
    (
      "model.engram.hidden_size",
      8,
      "model.engram.hidden_size: 8; valid: the model's hidden_size, 16",
    ),
    (
      "data.vocab_size",
      301,
      "model.vocab_size: 300; valid: at least the tokenizer's, "
      "data.vocab_size = 301",
    ),
  ],
)
def test_from_dict_names_the_field(path, value, message):
  with pytest.raises(InputError) as error:
    from_dict(ExperimentConfig, changed(path, value))
  assert str(error.value) == message


@pytest.mark.parametrize(
  "path", ["train", "train.steps", "model.attention", "model.engram.layers"]
)
def test_from_dict_names_a_missing_field(path):
  values = changed(path, None)
  *groups, name = path.split(".")
  group = values
  for part in groups:
    group = group[part]
  del group[name]
  with pytest.raises(InputError, match=rf"^{path}: missing; valid: a value$"):
    from_dict(ExperimentConfig, values)


def test_from_dict_path():
  with pytest.raises(InputError, match=r"^run\.train\.steps: 0; valid"):
    from_dict(TrainConfig, TRAIN | {"steps": 0}, path="run.train")


# --- What the dataclasses refuse --------------------------------------------

POSITIVE = {
  EngramConfig: "hidden_size heads head_dim streams conv_kernel_size "
  "smallest_order "
  "query_norm_eps key_norm_eps conv_norm_eps",
  AttentionConfig: "num_heads nope_dim rope_dim value_dim kv_rank rope_theta",
  YarnConfig: "scale original_length slow_turns fast_turns temperature",
  MoEConfig: "num_experts top_k expert_size capacity_factor",
  ModelConfig: "vocab_size hidden_size num_layers dense_size norm_eps init_std "
  "streams sinkhorn_iterations",
  TrainConfig: "steps batch_size seq_len accumulation learning_rate clip_norm "
  "checkpoint_every keep_last log_every eval_batches adam_eps "
  "table_learning_rate_multiplier",
  MeshConfig: "expert tensor lookup_capacity",
}
NOT_NEGATIVE = {
  EngramConfig: "table_init_std",
  MoEConfig: "num_shared balance_rate balance_loss",
  AttentionConfig: "block_size",
  ModelConfig: "num_dense_layers",
  TrainConfig: "warmup_steps eval_every keep_best weight_decay loss_chunk "
  "muon_momentum",
  MeshConfig: "data",
}


def cases(names: dict, values: tuple) -> list:
  """The values of each field, as numbers of its type."""
  found = []
  for cls, fields in names.items():
    for field in fields.split():
      kind = typing.get_type_hints(cls)[field]
      for value in values + ((float("nan"),) if kind is float else ()):
        name = f"{cls.__name__}.{field}={value}"
        found.append(pytest.param(cls, field, kind(value), id=name))
  return found


@pytest.mark.parametrize(
  "cls, field, value",
  cases(POSITIVE, (0, -1)) + cases(NOT_NEGATIVE, (-1,)),
)
def test_refuses_small_numbers(cls, field, value):
  with pytest.raises(InputError) as error:
    cls(**VALID[cls] | {field: value})
  assert error.value.field == field
  assert error.value.value is value


@pytest.mark.parametrize("cls", NOT_NEGATIVE)
def test_takes_zero(cls):
  for field in NOT_NEGATIVE[cls].split():
    zero = typing.get_type_hints(cls)[field](0)
    assert getattr(cls(**VALID[cls] | {field: zero}), field) == 0


OTHER = [
  (EngramConfig, {"layers": ()}, "layers"),
  (EngramConfig, {"layers": (1, 1)}, "layers"),
  (EngramConfig, {"layers": (-1,)}, "layers"),
  (EngramConfig, {"rows_per_head": ()}, "rows_per_head"),
  (EngramConfig, {"rows_per_head": (5, 1)}, "rows_per_head"),
  (EngramConfig, {"conv_dilation": 0}, "conv_dilation"),
  (EngramConfig, {"conv_dilation": -2}, "conv_dilation"),
  (EngramConfig, {"dtype": "float16"}, "dtype"),
  (AttentionConfig, {"rope_dim": 5}, "rope_dim"),
  (MoEConfig, {"top_k": 5}, "top_k"),
  (MoEConfig, {"dispatch": "other"}, "dispatch"),
  (ModelConfig, {"dtype": "float64"}, "dtype"),
  (AttentionConfig, {"block_size": -1}, "block_size"),
  (YarnConfig, {"scale": 0.5}, "scale"),
  (YarnConfig, {"slow_turns": 32.0}, "slow_turns"),
  (ModelConfig, {"streams": 0}, "streams"),
  (ModelConfig, {"streams": 2}, "engram.streams"),
  (ModelConfig, {"remat": "all"}, "remat"),
  (ModelConfig, {"num_layers": 1, "num_dense_layers": 0}, "engram.layers"),
  (ModelConfig, {"num_layers": 1}, "num_dense_layers"),
  (ModelConfig, {"hidden_size": 8}, "engram.hidden_size"),
  (ModelConfig, {"dtype": "bfloat16"}, "engram.dtype"),
  (ModelConfig, {"vocab_size": 2}, "engram.pad_id"),
  (
    ModelConfig,
    {"engram": EngramConfig(**ENGRAM, streams=4)},
    "engram.streams",
  ),
  (DataConfig, {"validation_percent": 0}, "validation_percent"),
  (DataConfig, {"validation_percent": 100}, "validation_percent"),
  (DataConfig, {"vocab_size": 257}, "vocab_size"),
  (DataConfig, {"folder": "a", "tfds_name": "b"}, "tfds_name"),
  (TrainConfig, {"accumulation": 3}, "accumulation"),
  (TrainConfig, {"on_nonfinite": "ignore"}, "on_nonfinite"),
  (TrainConfig, {"optimizer": "sgd"}, "optimizer"),
  (TrainConfig, {"muon_momentum": 1.0}, "muon_momentum"),
  (TrainConfig, {"loss_chunk": -1}, "loss_chunk"),
  (TrainConfig, {"table_optimizer": "none"}, "table_optimizer"),
  (TrainConfig, {"adam_b1": 1.0}, "adam_b1"),
  (TrainConfig, {"adam_b2": -0.1}, "adam_b2"),
  (TrainConfig, {"decay_points": (0.9, 0.8)}, "decay_points"),
  (TrainConfig, {"decay_points": (0.8, 0.8)}, "decay_points"),
  (TrainConfig, {"decay_points": (0.8, 1.0)}, "decay_points"),
  (TrainConfig, {"decay_points": (0.0, 0.8)}, "decay_points"),
  (TrainConfig, {"decay_factors": (0.1,)}, "decay_factors"),
]


@pytest.mark.parametrize("cls, changes, field", OTHER)
def test_refuses(cls, changes, field):
  with pytest.raises(InputError) as error:
    cls(**VALID[cls] | changes)
  assert error.value.field == field
  assert str(error.value).startswith(f"{field}: ")
  assert "\n" not in str(error.value)


def test_every_config_is_tested():
  found = {
    cls
    for cls in (vars(configs) | vars(run_configs)).values()
    if isinstance(cls, type) and dataclasses.is_dataclass(cls)
  }
  assert found == {*VALID, ExperimentConfig}


def test_the_tokenizer_must_fit_the_model():
  model = ModelConfig(**MODEL)
  with pytest.raises(InputError) as error:
    ExperimentConfig(model, DataConfig(vocab_size=301), TrainConfig(**TRAIN))
  assert error.value.field == "model.vocab_size"


# --- Derived values ----------------------------------------------------------


@pytest.mark.parametrize(
  "trained, used",
  [("bucketed", "dense"), ("dense", "dense"), ("dropless", "dropless")],
)
def test_a_dispatch_that_drops_nothing(trained, used):
  moe = MoEConfig(**MOE | {"dispatch": trained})
  assert ModelConfig(**MODEL, moe=moe).exact_dispatch == used
  assert ModelConfig(**MODEL).exact_dispatch is None


def test_engram_properties():
  engram = EngramConfig(**ENGRAM, heads=4, head_dim=8)
  assert engram.max_order == 3
  assert engram.columns == 8
  assert engram.memory_width == 64
  assert engram.dilation == 3
  assert dataclasses.replace(engram, conv_dilation=2).dilation == 2


def test_which_blocks_have_experts():
  model = ModelConfig(**MODEL, moe=MoEConfig(**MOE), num_dense_layers=1)
  assert [model.is_moe(layer) for layer in range(2)] == [False, True]
  assert not ModelConfig(**MODEL).is_moe(1)


@pytest.mark.parametrize(
  "make, name, value",
  [
    (lambda **x: TrainConfig(**STEPS | x), "seed", 2**32),
    (lambda **x: TrainConfig(**STEPS | x), "seed", -1),
    (lambda **x: TrainConfig(**STEPS | x), "seed", 1.5),
    (lambda **x: TrainConfig(**STEPS | x), "steps", 2**31),
    (lambda **x: TrainConfig(**STEPS | x), "steps", 10.5),
    (lambda **x: TrainConfig(**STEPS | x), "batch_size", True),
    (lambda **x: EngramConfig(**MEMORY | x), "seed", 2**32),
    (lambda **x: EngramConfig(**MEMORY | x), "seed", -1),
    (lambda **x: EngramConfig(**MEMORY | x), "heads", 2.0),
    (lambda **x: EngramConfig(**MEMORY | x), "conv_dilation", 1.5),
    (lambda **x: EngramConfig(**MEMORY | x), "rows_per_head", (10.5,)),
    (lambda **x: AttentionConfig(**x), "kv_rank", 2.5),
    (lambda **x: DataConfig(**x), "vocab_size", 300.0),
    (lambda **x: MeshConfig(**x), "expert", 1.0),
  ],
)
@pytest.mark.usefixtures("types_unchecked")
def test_numbers_that_would_be_rounded_or_cut_off_are_refused(
  make, name, value
):
  with pytest.raises(InputError, match=rf"^{name}[^ ]*: .*integer"):
    make(**{name: value})


@pytest.mark.parametrize(
  "cls, name, value",
  [
    (EngramConfig, "table_init_std", 1e39),
    (EngramConfig, "key_norm_eps", 1e-46),
    (YarnConfig, "scale", 1e300),
    (MoEConfig, "balance_loss", 1e39),
    (ModelConfig, "init_std", 1e-60),
    (ModelConfig, "norm_eps", "1e-6"),
    (TrainConfig, "learning_rate", 1e39),
    (TrainConfig, "adam_eps", 1e-50),
    (TrainConfig, "decay_factors", (0.3, 1e-50)),
    (MeshConfig, "lookup_capacity", float("inf")),
  ],
)
@pytest.mark.usefixtures("types_unchecked")
def test_numbers_that_leave_float32_are_refused(cls, name, value):
  with pytest.raises(InputError, match=rf"^{name}[^ ]*: .*number of float32"):
    cls(**VALID[cls] | {name: value})


@pytest.mark.parametrize("name", ["adam_b1", "adam_b2", "muon_momentum"])
def test_a_decay_that_becomes_1_in_float32_is_refused(name):
  with pytest.raises(InputError, match=f"^{name}: .*; valid: .* 1 - 2"):
    TrainConfig(**TRAIN | {name: 1 - 1e-9})


STEPS = {"steps": 1, "batch_size": 1, "seq_len": 1}
MEMORY = {"hidden_size": 4, "layers": (0,), "rows_per_head": (10,)}
