"""Fields that would change the mathematics if they were honoured, with the values at which they do not.

transformers ignores fields that an architecture does not know, so housekeeping of any name may stand in a
config. These may not: a checkpoint that carries one was trained for a computation that is not ours. A family
that reads one of them supports it, and it is not looked at here.
"""

from typing import Any

from converters.families.fields import Fields

_MUST_BE_OFF = frozenset(
    (
        # weights that are not plain matrices, or are shared, or belong to other modalities and heads
        *("quantization_config", "compression_config", "num_kv_shared_layers", "num_nextn_predict_layers"),
        *("text_config", "vision_config", "audio_config", "is_encoder_decoder"),
        *("add_cross_attention", "cross_attention_layers"),
        # mixtures of experts, latent attention, state space layers
        *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_shared_experts"),
        *("n_shared_experts", "moe_intermediate_size", "q_lora_rank", "kv_lora_rank", "v_head_dim"),
        *("qk_rope_head_dim", "qk_nope_head_dim", "linear_num_key_heads", "linear_attention"),
        *("layers_block_type", "mamba_d_state"),
        # scales and caps on activations
        *("attention_multiplier", "query_pre_attn_scalar", "attention_scale", "dim_model_base"),
        *("attn_logit_softcapping", "final_logit_softcapping", "logits_soft_cap", "clip_qkv", "swiglu_limit"),
        *("scale_embedding", "attn_temperature_tuning", "scale_attn_by_inverse_layer_idx"),
        *("zero_centered_gamma", "norm_add_unit_offset"),
        # positions
        *("alibi", "use_alibi", "no_rope_layers", "no_rope_layer_interval", "mrope_section"),
        *("rope_interleave", "rope_interleaved", "rotary_interleaved"),
        *("rope_local_base_freq", "local_rope_theta", "global_rope_theta", "layer_rope_theta"),
        # who sees whom
        *("sliding_window", "sliding_windows", "sliding_window_pattern", "use_sliding_window"),
        *("attention_chunk_size", "use_bidirectional_attention", "prefix_lm"),
        *("sparse_attention", "attention_sinks", "num_sink_tokens", "index_topk"),
        # the shape of the block
        *("use_parallel_residual", "parallel_attn", "parallel_residual"),
        *("attention_bias", "mlp_bias", "qkv_bias", "use_bias", "lm_head_bias", "o_bias"),
        *("use_qk_norm", "qk_norm", "qk_layernorm", "use_qkv_norm"),
        *("mlp_type", "ffn_type", "mlp_layer_types", "cla_share_factor", "use_cla"),
    )
)
_MUST_BE_ONE = frozenset(
    (
        *("logit_scale", "logits_scaling", "scale_emb", "scale_depth", "embedding_scale"),
        *("residual_multiplier", "embedding_multiplier", "lm_head_multiplier"),
        *("partial_rotary_factor", "rotary_pct", "rotary_percent"),
    )
)
_MUST_BE_ONE_OF: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("rope", "rotary"),
    "is_causal": (True,),
    "norm_type": ("rms_norm", "rmsnorm", "RMSNorm"),
    "hidden_activation": ("silu", "swish"),
}
_SCALES = ("_multiplier", "_softcapping", "_softcap", "_soft_cap")  # how new architectures end such names


def refuse_unsupported(fields: Fields) -> None:
    """ConfigError for the first field that changes the mathematics and that the family has not read."""
    for name, value in fields.unread().items():
        if name in _MUST_BE_OFF:
            harmless, rule = not value, "absent, null, false, 0 or empty"
        elif name in _MUST_BE_ONE_OF:
            harmless, rule = value in _MUST_BE_ONE_OF[name], f"one of {_MUST_BE_ONE_OF[name]}"
        elif name in _MUST_BE_ONE or name.endswith(_SCALES):
            harmless, rule = value == 1, "absent, null or 1"
        else:
            continue
        if not harmless:
            raise fields.error(name, f"it changes what the model computes; it must be {rule}")
