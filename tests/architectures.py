"""Small models of many transformers architectures: class, config, and a batch with a loss."""

from __future__ import annotations

from typing import Any

import torch
from assets import need
from torch import Tensor, nn

Batch = dict[str, Any]

IDS = torch.arange(1, 21).view(2, 10)
CLASSES = torch.tensor([0, 1])
IMAGES = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
SOUND = torch.sin(torch.arange(800.0).square()).view(2, 400)
MEL = torch.linspace(-1, 1, 2 * 8 * 20).view(2, 8, 20)

LANGUAGE: Batch = {"input_ids": IDS, "labels": IDS}
TEXT: Batch = {"input_ids": IDS, "labels": CLASSES}
VISION: Batch = {"pixel_values": IMAGES, "labels": CLASSES}
BOTH: Batch = {"input_ids": IDS, "pixel_values": IMAGES, "return_loss": True}

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 1}
PATCHES: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
CODER: dict[str, Any] = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}

ARCHITECTURES: dict[str, tuple[str, str, Batch, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", TEXT, {**SIZES, "num_labels": 2}),
    "roberta": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        TEXT,
        {**SIZES, "num_labels": 2, "pad_token_id": 0},
    ),
    "electra": (
        "ElectraForSequenceClassification",
        "ElectraConfig",
        TEXT,
        {**SIZES, "embedding_size": 16, "num_labels": 2},
    ),
    "albert": (
        "AlbertForSequenceClassification",
        "AlbertConfig",
        TEXT,
        {**SIZES, "embedding_size": 8, "num_labels": 2},
    ),
    "deberta_v2": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        TEXT,
        {
            **SIZES,
            "num_labels": 2,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "type_vocab_size": 2,
        },
    ),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        TEXT,
        {
            "vocab_size": 40,
            "dim": 16,
            "hidden_dim": 24,
            "n_layers": 2,
            "n_heads": 2,
            "num_labels": 2,
        },
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        LANGUAGE,
        {**SIZES, "pad_token_id": 0},
    ),
    "xlnet": (
        "XLNetLMHeadModel",
        "XLNetConfig",
        LANGUAGE,
        {"vocab_size": 40, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24},
    ),
    "longformer": (
        "LongformerForSequenceClassification",
        "LongformerConfig",
        TEXT,
        {**SIZES, "num_labels": 2, "attention_window": 4, "pad_token_id": 0},
    ),
    "led": (
        "LEDForConditionalGeneration",
        "LEDConfig",
        LANGUAGE,
        {
            **CODER,
            "attention_window": 4,
            "max_encoder_position_embeddings": 64,
            "max_decoder_position_embeddings": 64,
        },
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        LANGUAGE,
        {**CODER, "max_position_embeddings": 64},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        LANGUAGE,
        {
            "vocab_size": 40,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        LANGUAGE,
        {"vocab_size": 40, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2},
    ),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        LANGUAGE,
        {
            "vocab_size": 40,
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
        },
    ),
    "gptj": (
        "GPTJForCausalLM",
        "GPTJConfig",
        LANGUAGE,
        {
            "vocab_size": 40,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "rotary_dim": 4,
            "n_positions": 64,
        },
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        LANGUAGE,
        {
            **SIZES,
        },
    ),
    "gpt_bigcode": (
        "GPTBigCodeForCausalLM",
        "GPTBigCodeConfig",
        LANGUAGE,
        {"vocab_size": 40, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2},
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        LANGUAGE,
        {
            "vocab_size": 40,
            "hidden_size": 16,
            "ffn_dim": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 8,
        },
    ),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        LANGUAGE,
        {"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    ),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        LANGUAGE,
        {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    ),
    "mpt": (
        "MptForCausalLM",
        "MptConfig",
        LANGUAGE,
        {"vocab_size": 40, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 32},
    ),
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        LANGUAGE,
        {
            **GROUPED,
        },
    ),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        LANGUAGE,
        {
            **GROUPED,
            "head_dim": 8,
            "num_local_experts": 2,
            "intermediate_size_mlp": 24,
            "pad_token_id": 0,
            "attention_chunk_size": 16,
        },
    ),
    "mistral": (
        "MistralForCausalLM",
        "MistralConfig",
        LANGUAGE,
        {
            **GROUPED,
        },
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        LANGUAGE,
        {**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "qwen2": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        LANGUAGE,
        {
            **GROUPED,
        },
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        LANGUAGE,
        {
            **GROUPED,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
        },
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", LANGUAGE, {**GROUPED, "head_dim": 8}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        LANGUAGE,
        {
            **GROUPED,
            "head_dim": 8,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 8,
        },
    ),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", LANGUAGE, {**GROUPED, "head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", LANGUAGE, {**GROUPED, "head_dim": 8}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", LANGUAGE, {**GROUPED, "head_dim": 8}),
    "phi": (
        "PhiForCausalLM",
        "PhiConfig",
        LANGUAGE,
        {
            **SIZES,
        },
    ),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", LANGUAGE, {**SIZES, "pad_token_id": 0}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", LANGUAGE, {**SIZES, "pad_token_id": 0}),
    "granite": (
        "GraniteForCausalLM",
        "GraniteConfig",
        LANGUAGE,
        {
            **GROUPED,
        },
    ),
    "cohere": (
        "CohereForCausalLM",
        "CohereConfig",
        LANGUAGE,
        {
            **GROUPED,
        },
    ),
    "starcoder2": (
        "Starcoder2ForCausalLM",
        "Starcoder2Config",
        LANGUAGE,
        {
            **GROUPED,
        },
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        LANGUAGE,
        {
            **GROUPED,
            "head_dim": 8,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "pad_token_id": 0,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        LANGUAGE,
        {
            **SIZES,
            "moe_intermediate_size": 8,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
        },
    ),
    "jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        LANGUAGE,
        {
            **GROUPED,
            "num_experts": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "pad_token_id": 0,
        },
    ),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        LANGUAGE,
        {"vocab_size": 40, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2},
    ),
    "mamba2": (
        "Mamba2ForCausalLM",
        "Mamba2Config",
        LANGUAGE,
        {
            "vocab_size": 40,
            "hidden_size": 16,
            "state_size": 4,
            "num_hidden_layers": 2,
            "num_heads": 4,
            "head_dim": 8,
            "n_groups": 1,
        },
    ),
    "rwkv": (
        "RwkvForCausalLM",
        "RwkvConfig",
        LANGUAGE,
        {
            "vocab_size": 40,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "attention_hidden_size": 16,
            "rescale_every": 0,
            "use_cache": False,
        },
    ),
    "recurrent_gemma": (
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        LANGUAGE,
        {
            "vocab_size": 40,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "lru_width": 16,
        },
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", VISION, {**PATCHES, "num_labels": 2}),
    "deit": ("DeiTForImageClassification", "DeiTConfig", VISION, {**PATCHES, "num_labels": 2}),
    "beit": ("BeitForImageClassification", "BeitConfig", VISION, {**PATCHES, "num_labels": 2}),
    "dinov2": (
        "Dinov2ForImageClassification",
        "Dinov2Config",
        VISION,
        {
            "image_size": 16,
            "patch_size": 4,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_labels": 2,
        },
    ),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        VISION,
        {
            "image_size": 16,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 2,
            "num_labels": 2,
        },
    ),
    "swinv2": (
        "Swinv2ForImageClassification",
        "Swinv2Config",
        VISION,
        {
            "image_size": 16,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 2,
            "num_labels": 2,
        },
    ),
    "convnext": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        VISION,
        {
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "num_stages": 2,
            "patch_size": 2,
            "image_size": 16,
            "num_labels": 2,
        },
    ),
    "resnet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        VISION,
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 2},
    ),
    "segformer": (
        "SegformerForImageClassification",
        "SegformerConfig",
        VISION,
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [8, 16],
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
            "num_labels": 2,
        },
    ),
    "wav2vec2": (
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2Config",
        {"input_values": SOUND, "labels": CLASSES},
        {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "conv_dim": [8, 8],
            "conv_stride": [5, 2],
            "conv_kernel": [10, 3],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
            "num_labels": 2,
            "classifier_proj_size": 8,
        },
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {"input_features": MEL, "labels": IDS},
        {
            **CODER,
            "num_mel_bins": 8,
            "max_source_positions": 10,
            "max_target_positions": 32,
            "pad_token_id": 0,
            "decoder_start_token_id": 1,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        BOTH,
        {
            "text_config": {**SIZES, "projection_dim": 8},
            "vision_config": {**PATCHES, "projection_dim": 8},
            "projection_dim": 8,
        },
    ),
    "siglip": (
        "SiglipModel",
        "SiglipConfig",
        BOTH,
        {"text_config": SIZES, "vision_config": PATCHES},
    ),
}


def architecture(name: str) -> tuple[nn.Module, Batch]:
    """The model, in eval mode and frozen, with random weights that are the same each time."""
    need("transformers")
    import transformers

    cls, config, batch, settings = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**settings))
    return model.eval().requires_grad_(False), batch


def outputs(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    return {k: v for k, v in model(**batch).items() if isinstance(v, Tensor)}
