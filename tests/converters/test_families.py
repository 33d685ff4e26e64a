"""From config.json to ModelConfig: both of transformers' forms, its defaults, and what is refused."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from converters.families import FAMILIES, model_config
from tests.converters.conftest import config_of
from xquant_jax.errors import ConfigError
from xquant_jax.numerics.rope import Rope
from xquant_jax.parameters import layer_parameters, outer_parameters

GOLDEN = Path(__file__).parents[1] / "golden"
REAL_CONFIGS = sorted((GOLDEN / "configs").glob("*.json"))
FAMILY_NAMES = ("llama", "mistral", "qwen2", "qwen3")

# of config.json files that transformers 4 wrote: D, L, H, K, d, F, tied, eps, window of the first layer
SIZES = {
    "Llama-2-7b-hf": (4096, 32, 32, 32, 128, 11008, False, 1e-5, None),
    "Llama-3.1-8B": (4096, 32, 32, 8, 128, 14336, False, 1e-5, None),
    "Llama-3.2-1B": (2048, 16, 32, 8, 64, 8192, True, 1e-5, None),
    "Mistral-7B-v0.1": (4096, 32, 32, 8, 128, 14336, False, 1e-5, 4096),
    "Mistral-7B-v0.3": (4096, 32, 32, 8, 128, 14336, False, 1e-5, None),
    "Qwen2.5-7B": (3584, 28, 28, 4, 128, 18944, False, 1e-6, None),
    "Qwen2.5-7B-Instruct-yarn": (3584, 28, 28, 4, 128, 18944, False, 1e-6, None),
    "Qwen3-0.6B": (1024, 28, 16, 8, 128, 3072, True, 1e-6, None),
    "Qwen3-8B": (4096, 36, 32, 8, 128, 12288, False, 1e-6, None),
}


def as_transformers_5(config):
    """The same config in the form of transformers 5: rope_parameters and dtype."""
    config = dict(config)
    scaling = dict(config.pop("rope_scaling", None) or {})
    scaling["rope_type"] = scaling.pop("type", scaling.get("rope_type", "default"))
    config["rope_parameters"] = scaling | {"rope_theta": config.pop("rope_theta", 10_000.0)}
    config["dtype"] = config.pop("torch_dtype")
    return config


@pytest.mark.parametrize("file", REAL_CONFIGS, ids=lambda file: file.stem)
def test_both_forms_of_a_real_config_mean_the_same(file):
    config = json.loads(file.read_text())
    assert "rope_parameters" not in config
    assert model_config(as_transformers_5(config)) == model_config(config)


@pytest.mark.parametrize("file", REAL_CONFIGS, ids=lambda file: file.stem)
def test_sizes_of_a_real_config(file):
    c = model_config(json.loads(file.read_text()))
    sizes = (c.width, c.num_layers, c.num_heads, c.num_kv_heads, c.head_dim, c.mlp_width)
    assert (*sizes, c.tied_embeddings, c.norm_eps, c.sliding_windows[0]) == SIZES[file.stem]


def test_biases_and_norms_belong_to_the_family(tiny_config):
    flags = {}
    for family in FAMILY_NAMES:
        c = model_config(tiny_config(family))
        flags[family] = (c.qkv_bias, c.output_bias, c.mlp_bias, c.qk_norm)
    assert flags == {
        "llama": (False, False, False, False),
        "mistral": (False, False, False, False),
        "qwen2": (True, False, False, False),
        "qwen3": (False, False, False, True),
    }


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_attention_bias_is_on_all_four_projections(tiny_config, family):
    c = model_config(tiny_config(family, attention_bias=True))
    assert (c.qkv_bias, c.output_bias, c.mlp_bias) == (True, True, False)


def test_llama_mlp_bias(tiny_config):
    assert model_config(tiny_config("llama", mlp_bias=True)).mlp_bias


@pytest.mark.parametrize(
    ("family", "kv_heads", "head_dim", "window"),
    [("llama", 64, 2, None), ("mistral", 8, 2, 4096), ("qwen2", 32, 2, None), ("qwen3", 32, 128, None)],
)
def test_defaults_of_absent_fields_are_those_of_transformers(tiny_config, family, kv_heads, head_dim, window):
    config = tiny_config(family, hidden_size=128, num_attention_heads=64)
    optional = (
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "rope_theta",
        "tie_word_embeddings",
        "torch_dtype",
    )
    c = model_config({name: value for name, value in config.items() if name not in optional})
    assert (c.num_kv_heads, c.head_dim, c.sliding_windows) == (kv_heads, head_dim, (window, window))
    assert (c.norm_eps, c.rope, c.tied_embeddings) == (1e-6, Rope(theta=10_000.0), False)


def test_null_heads_mean_as_many_as_queries(tiny_config):
    assert model_config(tiny_config("mistral", num_key_value_heads=None)).num_kv_heads == 4


def test_the_type_of_the_weights(tiny_config):
    for field in ({"torch_dtype": "float16"}, {"torch_dtype": ..., "dtype": "float16"}):
        assert model_config(tiny_config("llama", **field)).dtype == "float16"
    with pytest.raises(ConfigError, match="torch_dtype='float64' is not supported; supported: bfloat16"):
        model_config(tiny_config("llama", torch_dtype="float64"))


# ---- which family


def test_the_model_type_decides_where_no_architecture_is_named(tiny_config):
    assert model_config(tiny_config("qwen2", architectures=...)).qkv_bias


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, r"architectures=\['GemmaForCausalLM'\].*LlamaForCausalLM"),
        ({"architectures": ..., "model_type": "gemma"}, "model_type='gemma'.*llama, mistral, qwen2, qwen3"),
        ({"architectures": ..., "model_type": ...}, "architectures is missing.*LlamaForCausalLM"),
        ({"model_type": "mistral"}, "model_type='mistral' contradicts architectures"),
    ],
)
def test_unknown_architectures_are_refused(tiny_config, changes, message):
    with pytest.raises(ConfigError, match=message):
        model_config(tiny_config("llama", **changes))


def test_every_family_names_every_parameter(tiny_config):
    assert [family.model_type for family in FAMILIES] == list(FAMILY_NAMES)
    for family in FAMILIES:
        names = [*family.layer_names.values(), *family.outer_names.values()]
        assert len(set(names)) == len(names)


# ---- positions


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_linear_scaling(tiny_config, field, key):
    config = tiny_config("llama", **{field: {key: "linear", "factor": 4.0}})
    assert model_config(config).rope == Rope(theta=10_000.0, scaling="linear", factor=4.0)


def test_theta_among_the_rope_parameters_wins(tiny_config):
    config = tiny_config("llama", rope_theta=1.0, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert model_config(config).rope == Rope(theta=5e5)


def test_llama3_scaling(tiny_config):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    expected = Rope(10_000.0, "llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    inside = tiny_config("llama", rope_scaling=scaling | {"original_max_position_embeddings": 8192})
    beside = tiny_config(
        "llama",
        rope_scaling=scaling | {"original_max_position_embeddings": 64},
        original_max_position_embeddings=8192,
    )
    absent = tiny_config("llama", rope_scaling=scaling, max_position_embeddings=8192)
    assert [model_config(c).rope for c in (inside, beside, absent)] == [expected] * 3


def yarn(**changes):
    return {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64} | changes


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"factor": 1.0}, 1.0),
        ({"attention_factor": 1.25}, 1.25),
        ({"mscale": 2.0, "mscale_all_dim": 0.5}, (0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1)),
        ({"mscale": 2.0}, 0.1 * math.log(4) + 1),
    ],
)
def test_yarn_attention_factor(tiny_config, changes, factor):
    rope = model_config(tiny_config("qwen2", rope_scaling=yarn(**changes))).rope
    assert rope.attention_factor == pytest.approx(factor, rel=1e-12)


def test_yarn_details(tiny_config):
    rope = model_config(tiny_config("qwen3", rope_scaling=yarn())).rope
    assert (rope.original_positions, rope.beta_fast, rope.beta_slow, rope.truncate) == (64, 32.0, 1.0, True)
    scaling = {"type": "yarn", "factor": 4.0, "beta_fast": 8, "beta_slow": 0.5, "truncate": False}
    rope = model_config(tiny_config("qwen3", rope_scaling=scaling)).rope
    assert (rope.original_positions, rope.beta_fast, rope.beta_slow, rope.truncate) == (
        32_768,
        8.0,
        0.5,
        False,
    )


def test_dynamic_scaling_begins_beyond_the_models_positions(tiny_config):
    scaling = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}
    rope = model_config(tiny_config("llama", rope_scaling=scaling, max_position_embeddings=512)).rope
    assert rope == Rope(10_000.0, "dynamic", 2.0, 512)
    assert model_config(tiny_config("llama", rope_scaling=scaling)).rope.longest == 2048  # Llama's default


def longrope(**changes):
    """For heads of 6."""
    scaling = {"rope_type": "longrope", "short_factor": [1, 1.5, 2.0], "long_factor": [1.0, 4.0, 9.0]}
    return scaling | {"original_max_position_embeddings": 64} | changes


def test_longrope(tiny_config):
    def rope(scaling, **changes):
        return model_config(tiny_config("llama", rope_scaling=scaling, max_position_embeddings=256, **changes)).rope

    ratio = math.sqrt(1 + math.log(4) / math.log(64))  # 256 positions over 64
    expected = Rope(
        scaling="longrope",
        original_positions=64,
        attention_factor=ratio,
        short_factors=(1.0, 1.5, 2.0),
        long_factors=(1.0, 4.0, 9.0),
    )
    assert rope(longrope()) == expected
    beside = rope(longrope(original_max_position_embeddings=2), original_max_position_embeddings=64)
    assert beside == expected  # as Phi-3 has it
    for changes, factor in [
        ({"factor": 8.0}, math.sqrt(1 + math.log(8) / math.log(64))),
        ({"factor": 1.0}, 1.0),
        ({"factor": 8.0, "attention_factor": 1.25}, 1.25),
        ({"original_max_position_embeddings": None}, 1.0),
    ]:
        assert rope(longrope(**changes)).attention_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"type": "su"}, "rope_type='su'.*default, linear, dynamic, llama3, yarn, longrope"),
        ({"rope_type": "dynamic"}, "rope_scaling.factor is missing"),
        ({"rope_type": "dynamic", "factor": 2.0, "alpha": 1000.0}, "alpha=1000.0.*known RoPE parameters"),
        ({"rope_type": "longrope", "long_factor": [1.0] * 3}, "short_factor is missing"),
        (longrope(short_factor=[1.0] * 2), r"short_factor=\[1.0, 1.0\].*list of 3 numbers.*head_dim/2=3 pairs"),
        (longrope(long_factor=2.0), "long_factor=2.0.*list of 3 numbers"),
        (longrope(long_factor=[1.0, 0.0, 1.0]), "long_factor=.*; 0.0 in it is not a finite number above zero"),
        (longrope(long_factor=[1.0, "2", 1.0]), "long_factor=.*; '2' in it"),
        (longrope(short_factor=[True, 1.0, 1.0]), "short_factor=.*; True in it"),
        (longrope(short_factor=[1.0, 1.0, math.inf]), "short_factor=.*; inf in it"),
        (longrope(original_max_position_embeddings=1), "original_max_position_embeddings=1.*at least 2"),
        (longrope(factor=-2.0), "rope_scaling.factor=-2.0.*above zero"),
        ({"rope_type": "linear"}, "rope_scaling.factor is missing"),
        ({"rope_type": "linear", "factor": "2"}, "rope_scaling.factor='2'.*number"),
        ({"rope_type": "linear", "factor": -1}, "rope_scaling.factor=-1.*above zero"),
        ({"rope_type": "llama3", "factor": 2.0}, "low_freq_factor is missing"),
        (
            {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
            "high_freq_factor=4.0.*above low_freq_factor",
        ),
        ({"rope_type": "default", "mrope_section": [1, 2]}, "mrope_section"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5.*1.0"),
        ({"full_attention": {"rope_type": "default"}}, r"per layer type \(full_attention\)"),
        ("linear", "rope_scaling='linear'"),
    ],
)
def test_unsupported_positions_are_refused(tiny_config, scaling, message):
    with pytest.raises(ConfigError, match=message):
        model_config(tiny_config("llama", rope_scaling=scaling))


# ---- windows

FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("mistral", {"sliding_window": 16}, (16, 16)),
        ("mistral", {"sliding_window": None}, (None, None)),
        ("mistral", {}, (4096, 4096)),
        ("mistral", {"sliding_window": 16, "layer_types": [SLIDING] * 2}, (16, 16)),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 0}, (None, None)),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, (None, 16)),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, (4096, 4096)),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16}, (None, None)),  # 28 layers are full
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 16, "layer_types": [SLIDING, FULL]},
            (16, None),
        ),
        ("qwen3", {"sliding_window": None, "layer_types": [FULL, FULL]}, (None, None)),
        ("llama", {"layer_types": [FULL, FULL], "sliding_window": None}, (None, None)),
        ("llama", {"use_sliding_window": False, "sliding_window": 16}, (None, None)),
    ],
)
def test_windows(tiny_config, family, changes, windows):
    assert model_config(tiny_config(family, **changes)).sliding_windows == windows


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"layer_types": [SLIDING, FULL]}, "layer_types=.*only full_attention"),
        ("llama", {"sliding_window": 16}, "sliding_window=16"),
        ("llama", {"sliding_window": 16, "use_sliding_window": None}, "sliding_window=16"),
        ("llama", {"sliding_window": 16, "use_sliding_window": True}, "use_sliding_window=True.*no sliding windows"),
        ("mistral", {"sliding_window": 16, "layer_types": [SLIDING, FULL]}, "only sliding_attention"),
        ("mistral", {"sliding_window": 0}, "sliding_window=0.*at least 1"),
        ("qwen2", {"layer_types": [SLIDING, FULL]}, "needs use_sliding_window=true"),
        (
            "qwen3",
            {"layer_types": ["chunked_attention", FULL]},
            "layer_types=.*full_attention, sliding_attention",
        ),
        ("qwen3", {"layer_types": [FULL]}, "num_hidden_layers=2"),
        ("qwen3", {"layer_types": FULL}, "layer_types='full_attention'"),
    ],
)
def test_unsupported_windows_are_refused(tiny_config, family, changes, message):
    with pytest.raises(ConfigError, match=message):
        model_config(tiny_config(family, **changes))


# ---- everything else that is refused, or is not


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("llama", "hidden_act", "gelu"),
        ("llama", "hidden_act", 3),
        ("llama", "quantization_config", {"quant_method": "fp8"}),
        ("llama", "partial_rotary_factor", 0.5),
        ("llama", "attn_logit_softcapping", 50.0),
        ("llama", "final_logit_softcapping", 30.0),
        ("llama", "query_pre_attn_scalar", 256),
        ("llama", "logit_scale", 0.0625),
        ("llama", "embedding_multiplier", 12.0),
        ("llama", "residual_multiplier", 0.22),
        ("llama", "attention_multiplier", 0.01),
        ("llama", "logits_scaling", 8.0),
        ("llama", "some_new_multiplier", 2.0),
        ("llama", "clip_qkv", 8.0),
        ("llama", "num_local_experts", 8),
        ("qwen3", "num_experts", 128),
        ("llama", "alibi", True),
        ("llama", "no_rope_layers", [1, 0]),
        ("llama", "attention_chunk_size", 8192),
        ("llama", "attn_temperature_tuning", True),
        ("llama", "use_parallel_residual", True),
        ("llama", "sliding_window_pattern", 6),
        ("llama", "use_qk_norm", True),
        ("llama", "is_causal", False),
        ("mistral", "attention_bias", True),
        ("mistral", "mlp_bias", True),
        ("qwen2", "attention_bias", False),
    ],
)
def test_fields_that_change_the_mathematics_are_refused(tiny_config, family, field, value):
    with pytest.raises(ConfigError) as error:
        model_config(tiny_config(family, **{field: value}))
    assert f"{field}={value!r} is not supported" in str(error.value)


def test_neutral_values_and_housekeeping_are_accepted(tiny_config):
    plain = tiny_config("llama")
    neutral = {
        "hidden_act": "silu",
        "pretraining_tp": 4,
        "attention_dropout": 0.1,
        "partial_rotary_factor": 1.0,
        "logit_scale": 1,
        "num_experts": 0,
        "attn_logit_softcapping": None,
        "quantization_config": None,
        "use_cache": True,
        "initializer_range": 0.02,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "transformers_version": "4.44.0",
        "_name_or_path": "somewhere",
        "unsloth_fixed": True,
    }
    assert model_config(plain | neutral) == model_config(plain)


@pytest.mark.parametrize(
    "field",
    ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"],
)
def test_required_fields(tiny_config, field):
    for absent in (..., None):
        with pytest.raises(ConfigError, match=f"^{field} is missing from config.json"):
            model_config(tiny_config("llama", **{field: absent}))


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("vocab_size", -3, "at least 1"),
        ("hidden_size", "24", "whole number"),
        ("hidden_size", 24.5, "whole number"),
        ("num_hidden_layers", True, "whole number"),
        ("num_hidden_layers", 0, "at least 1"),
        ("num_key_value_heads", 0, "at least 1"),
        ("rms_norm_eps", 0.0, "above zero"),
        ("rms_norm_eps", float("nan"), "finite"),
        ("rope_theta", "1e4", "a number"),
        ("tie_word_embeddings", "yes", "true or false"),
    ],
)
def test_values_of_the_wrong_kind(tiny_config, field, value, rule):
    with pytest.raises(ConfigError, match=f"^{field}={value!r} is not supported; .*{rule}"):
        model_config(tiny_config("llama", **{field: value}))


def test_sizes_that_do_not_go_together(tiny_config):
    with pytest.raises(ConfigError, match=r"hidden_size=25.*multiple of num_attention_heads=4"):
        model_config(tiny_config("llama", head_dim=..., hidden_size=25))
    with pytest.raises(ConfigError, match="num_attention_heads must be a multiple of num_key_value_heads"):
        model_config(tiny_config("llama", num_key_value_heads=3))


def test_names_and_the_table_of_parameters_are_the_same() -> None:
    """With every option on, each row has a name, and each name a row."""
    options = dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias", "qk_norm"), True)
    config = dataclasses.replace(model_config(config_of("llama")), **options)
    for family in FAMILIES:
        assert {row.path for row in layer_parameters(config)} == set(family.layer_names)
        assert {row.path for row in outer_parameters(config)} == set(family.outer_names)
