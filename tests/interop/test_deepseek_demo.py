"""The demo's weights: its numbers through the loader, and every byte back."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.config import EngramConfig
from engram_jax.errors import InputError
from engram_jax.interop.deepseek_demo import DEMO, demo_weights, load_demo
from engram_jax.memory.hashing import NgramHash
from engram_jax.memory.table import lookup

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "module.npz")
CASES = {c["name"]: c for c in json.loads(str(GOLDEN["settings_json"]))}


def config_of(case) -> EngramConfig:
  return EngramConfig(
    hidden_size=case["hidden_size"],
    layers=tuple(case["layer_ids"]),
    rows_per_head=(case["min_rows_per_order"],) * (case["max_ngram"] - 1),
    heads=case["heads_per_order"],
    head_dim=GOLDEN[f"{case['name']}/weight/table"].shape[1],
    streams=case["hc_mult"],
    pad_id=case["pad_id"],
    seed=case["seed"],
    projection_bias=True,
    conv_kernel_size=case["kernel_size"],
    query_norm_eps=case["query_norm_eps"],
    key_norm_eps=case["key_norm_eps"],
    conv_norm_eps=case["conv_norm_eps"],
  )


def state_dict(case) -> dict:
  """The golden weights by the names that the demo's module gives them."""
  golden = lambda name: GOLDEN[f"{case['name']}/weight/{name}"]
  weights = {
    "multi_head_embedding.embedding.weight": golden("table"),
    "value_proj.weight": golden("value_weight"),
    "value_proj.bias": golden("value_bias"),
    "short_conv.conv.weight": golden("conv_weight"),
  }
  primes = GOLDEN[f"{case['name']}/primes"].reshape(-1)
  offsets = np.concatenate([[0], np.cumsum(primes[:-1])]).astype(np.int64)
  weights["multi_head_embedding.offsets"] = offsets
  for g in range(case["hc_mult"]):
    weights |= {
      f"key_projs.{g}.weight": golden("key_weight")[g],
      f"key_projs.{g}.bias": golden("key_bias")[g],
      f"norm1.{g}.weight": golden("key_norm")[g],
      f"norm2.{g}.weight": golden("query_norm")[g],
      f"short_conv.norms.{g}.weight": golden("conv_norm")[g],
    }
  return weights


@pytest.fixture(params=CASES)
def case(request):
  return CASES[request.param]


def test_golden_output(case):
  config, layer = config_of(case), case["layer_id"]
  assert config.dilation == case["dilation"]
  engram, table = load_demo(state_dict(case), config, layer)
  hashing = NgramHash.create(
    vocab_size=case["vocab_size"],
    rows_per_head=config.rows_per_head,
    heads=config.heads,
    layers=config.layers,
    pad_id=case["pad_id"],
    seed=case["seed"],
  )
  ids = hashing.row_ids_numpy(GOLDEN[f"{case['name']}/token_ids"], layer)
  hidden = GOLDEN[f"{case['name']}/hidden_states"]
  fused = jax.jit(lambda hidden, ids: engram(hidden, lookup(table, ids)))
  update, _ = fused(hidden, ids.astype(np.int32))
  expected = GOLDEN[f"{case['name']}/output_float64"]
  assert abs(update - expected).max() <= 1.5 * case["float32_error"]


def test_every_byte_comes_back(case):
  weights = state_dict(case)
  engram, table = load_demo(weights, config_of(case), case["layer_id"])
  padded = jnp.pad(table, ((0, 3), (0, 0)))
  for given in (table, padded):
    found = demo_weights(engram, given, case["layer_id"])
    assert set(found) == set(weights)
    for name, array in weights.items():
      assert found[name].dtype == array.dtype, name
      assert found[name].shape == array.shape, name
      assert found[name].tobytes() == array.tobytes(), name


def test_the_published_sizes():
  # The first and last prime of each layer, by DeepSeek's own run.
  hashing = NgramHash.create(
    vocab_size=98_627,
    rows_per_head=DEMO.rows_per_head,
    heads=DEMO.heads,
    layers=DEMO.layers,
    pad_id=2,
  )
  assert hashing.primes[1][[0, -1]].tolist() == [646403, 646619]
  assert hashing.primes[15][[0, -1]].tolist() == [646631, 646879]
  assert DEMO.memory_width == 1024 and DEMO.dilation == 3


def refused(weights, case, match, layer=None, **changes):
  settings = {**config_of(case).__dict__, **changes}
  with pytest.raises(InputError, match=match) as error:
    load_demo(weights, EngramConfig(**settings), layer or case["layer_id"])
  assert "\n" not in str(error.value)


def test_refuses_by_name():
  case = next(iter(CASES.values()))
  weights = state_dict(case)
  without = {k: v for k, v in weights.items() if k != "norm2.0.weight"}
  refused(without, case, r"^norm2\.0\.weight: missing; valid: float32\[")
  extra = weights | {"norm3.0.weight": np.zeros(3)}
  refused(extra, case, r"^weights: \['norm3\.0\.weight'\]")
  half = weights | {"value_proj.bias": np.float16(weights["value_proj.bias"])}
  refused(half, case, r"^value_proj\.bias: float16\[.*valid: float32\[")
  table = "multi_head_embedding.embedding.weight"
  short = weights | {table: weights[table][:-1]}
  refused(short, case, rf"^{table}: float32\[")
  offsets = weights["multi_head_embedding.offsets"] + 1
  moved = weights | {"multi_head_embedding.offsets": offsets}
  refused(moved, case, r"^multi_head_embedding\.offsets: \[1, ")
  refused(weights, case, r"^projection_bias: False", projection_bias=False)
  refused(weights, case, r"^short_conv: False", short_conv=False)
  refused(weights, case, r"^gate: False; valid: True, as in the", gate=False)
  refused(weights, case, r"^per_stream_keys: ", per_stream_keys=False)
  refused(weights, case, r"^addressing: one_row", addressing="one_row")
  refused(weights, case, r"^conv_dilation: 7", conv_dilation=7)
  refused(weights, case, r"^layer: 999; valid: one of", layer=999)


def test_refuses_a_table_of_another_layer():
  case = next(iter(CASES.values()))
  layer = case["layer_id"]
  engram, table = load_demo(state_dict(case), config_of(case), layer)
  with pytest.raises(InputError, match=r"^table: float32\[.*valid: float32\["):
    demo_weights(engram, table[:-1], layer)
  with pytest.raises(InputError, match=r"^table: bfloat16\["):
    demo_weights(engram, table.astype(jnp.bfloat16), layer)
