"""Transformers: tiny configurations of its architectures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

import torch

from hatfn.experiments.rows import Sample

Options = dict[str, Any]

TRUNK: Options = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
"""Two layers of 64 features."""

TEXT: Options = {
    **TRUNK,
    "vocab_size": 60,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Short texts of sixty words."""

GPT: Options = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 40,
    "vocab_size": 60,
    "pad_token_id": 0,
}
"""The same in the words of GPT."""

GROUPED: Options = {"num_key_value_heads": 2, "head_dim": 16}
"""Two heads share their keys."""

WORDS: dict[str, Options] = {
    "Albert": {**TEXT, "embedding_size": 64},
    "Bert": TEXT,
    "BigBird": {**TEXT, "attention_type": "original_full"},
    "BioGpt": TEXT,
    "Bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 60, "pad_token_id": 0},
    "Camembert": TEXT,
    "ConvBert": {**TEXT, "embedding_size": 64},
    "CTRL": {"n_embd": 64, "n_layer": 2, "n_head": 4, "dff": 128, "vocab_size": 60, "pad_token_id": 0},
    "Data2VecText": TEXT,
    "Deberta": {
        **TEXT,
        "num_hidden_layers": 4,
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
    },
    "DebertaV2": {
        **TEXT,
        "num_hidden_layers": 4,
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
    },
    "DistilBert": {
        "dim": 64,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 128,
        "vocab_size": 60,
        "pad_token_id": 0,
    },
    "Electra": {**TEXT, "embedding_size": 64},
    "Ernie": TEXT,
    "Esm": TEXT,
    "EuroBert": {**TEXT, **GROUPED},
    "FNet": {**TEXT, "tpu_short_seq_length": 8},
    "Falcon": {**TEXT, "alibi": False},
    "GPT2": GPT,
    "GPTBigCode": GPT,
    "GPTJ": {**GPT, "rotary_dim": 8},
    "GPTNeo": {**TEXT, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "GPTNeoX": TEXT,
    "Gemma": {**TEXT, **GROUPED},
    "Gemma2": {**TEXT, **GROUPED},
    "Glm": {**TEXT, **GROUPED},
    "Helium": {**TEXT, **GROUPED},
    "IBert": TEXT,
    "Llama": {**TEXT, **GROUPED},
    "MPNet": TEXT,
    "MegatronBert": TEXT,
    "Mistral": {**TEXT, **GROUPED},
    "MobileBert": {**TEXT, "embedding_size": 64, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    "ModernBert": TEXT,
    "Mpt": {
        "d_model": 64,
        "n_layers": 2,
        "n_heads": 4,
        "vocab_size": 60,
        "max_seq_len": 40,
        "pad_token_id": 0,
    },
    "Nystromformer": {**TEXT, "num_landmarks": 8, "segment_means_seq_len": 8},
    "OPT": {**TEXT, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "OpenAIGPT": GPT,
    "Olmo2": {**TEXT, **GROUPED},
    "Persimmon": TEXT,
    "Phi": TEXT,
    "Phi3": {**TEXT, **GROUPED},
    "Qwen2": {**TEXT, **GROUPED},
    "Qwen3": {**TEXT, **GROUPED},
    "RemBert": {**TEXT, "input_embedding_size": 64, "output_embedding_size": 64},
    "RoFormer": TEXT,
    "Roberta": TEXT,
    "RobertaPreLayerNorm": TEXT,
    "SmolLM3": {**TEXT, **GROUPED},
    "SqueezeBert": {**TEXT, "embedding_size": 64},
    "StableLm": {**TEXT, "num_key_value_heads": 4},
    "Starcoder2": TEXT,
    "XLMRoberta": TEXT,
    "XLNet": {
        "d_model": 64,
        "n_layer": 2,
        "n_head": 4,
        "d_inner": 128,
        "vocab_size": 60,
        "pad_token_id": 0,
    },
}
"""Classifiers of texts."""

STAGES: Options = {"hidden_sizes": [16, 32, 64], "depths": [1, 1, 1]}
"""Three stages of one block each."""

DEEPER: Options = {**TRUNK, "num_hidden_layers": 4}
"""Four layers: beside two, tables of positions would weigh as they never do."""

PATCHES: Options = {**DEEPER, "image_size": 32, "patch_size": 4}
"""Patches of four pixels."""

PYRAMID: Options = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
"""Four stages of one block each."""

HEADS: Options = {"num_attention_heads": [1, 2, 3, 4]}
"""More heads at every stage."""

WINDOWS: Options = {
    "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 2, 1], "num_heads": [1, 2, 4],
    "window_size": 4,
}  # fmt: skip
"""Attention in windows of 4 x 4 patches."""

PICTURES: dict[str, Options] = {
    "Beit": PATCHES,
    "Bit": {**STAGES, "embedding_size": 16, "num_groups": 8},
    "ConvNext": {**PYRAMID, "image_size": 32},
    "ConvNextV2": {**PYRAMID, "image_size": 32},
    "Cvt": {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 2, 3]},
    "Data2VecVision": PATCHES,
    "DeiT": PATCHES,
    "Dinov2": {**PATCHES, "mlp_ratio": 2},
    "Dinov2WithRegisters": {**PATCHES, "mlp_ratio": 2},
    "EfficientNet": {"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640},
    "FocalNet": {
        "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1, 1],
        "focal_levels": [2, 2, 2], "focal_windows": [3, 3, 3], "hidden_sizes": [16, 32, 64],
    },
    "HGNetV2": {},
    "IJepa": PATCHES,
    "Levit": {
        "image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4],
        "depths": [1, 1, 1], "key_dim": [8, 8, 8],
    },
    "MobileNetV1": {"depth_multiplier": 0.25},
    "MobileNetV2": {"depth_multiplier": 0.35},
    "MobileViT": {
        "image_size": 64, "hidden_sizes": [32, 48, 64],
        "neck_hidden_sizes": [8, 16, 24, 32, 48, 64, 64],
    },
    "MobileViTV2": {"image_size": 64, "width_multiplier": 0.5},
    "PPLCNet": {},
    "PoolFormer": PYRAMID,
    "Pvt": {**PYRAMID, **HEADS, "image_size": 64},
    "PvtV2": {**PYRAMID, **HEADS, "image_size": 64},
    "RegNet": {**PYRAMID, "embedding_size": 16, "groups_width": 8},
    "ResNet": {**STAGES, "embedding_size": 16, "layer_type": "basic"},
    "Segformer": {**PYRAMID, **HEADS},
    "SwiftFormer": {"depths": [1, 1, 1, 1], "embed_dims": [16, 32, 48, 64]},
    "Swin": WINDOWS,
    "Swinv2": WINDOWS,
    "ViT": PATCHES,
    "ViTMSN": PATCHES,
}  # fmt: skip
"""Classifiers of images; those without a size of their own take 64 pixels."""

SPEECH: Options = {
    **TRUNK,
    "conv_dim": [32, 32],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 32,
}
"""A short front end of convolutions."""

SOUNDS: dict[str, Options] = {
    "Data2VecAudio": {**SPEECH, "conv_pos_kernel_size": 5},
    "Hubert": SPEECH,
    "SEW": {**SPEECH, "squeeze_factor": 1},
    "UniSpeech": SPEECH,
    "UniSpeechSat": SPEECH,
    "Wav2Vec2": SPEECH,
    "WavLM": {**SPEECH, "num_buckets": 16},
}
"""Classifiers of sounds."""


def models() -> Mapping[str, Callable[[], Sample]]:
    """How to build each."""
    found = {name: partial(_words, name, options) for name, options in WORDS.items()}
    found |= {name: partial(_pictures, name, options) for name, options in PICTURES.items()}
    found |= {name: partial(_sounds, name, options) for name, options in SOUNDS.items()}
    found["VideoMAE"] = partial(_video, "VideoMAE", {**PATCHES, "num_frames": 4, "tubelet_size": 2})
    found["Timesformer"] = partial(_video, "Timesformer", {**PATCHES, "num_frames": 4})
    found["Vivit"] = partial(
        _video, "Vivit", {**PATCHES, "num_hidden_layers": 6, "num_frames": 4, "tubelet_size": [2, 4, 4]}
    )
    found["AST"] = partial(
        _spectrum,
        "AST",
        {
            **TRUNK,
            "patch_size": 4,
            "frequency_stride": 4,
            "time_stride": 4,
            "num_mel_bins": 16,
            "max_length": 32,
        },
    )
    return {**found, "T5 encoder": _t5}


def _build(name: str, task: str, options: Options) -> Any:
    library = import_module("transformers")
    architecture = getattr(library, f"{name}For{task}")
    module = architecture(architecture.config_class(**options, num_labels=4))
    if hasattr(module.config, "use_cache"):
        module.config.use_cache = False  # what generation would keep is no logit
    return module


def _words(name: str, options: Options) -> Sample:
    module = _build(name, "SequenceClassification", options)
    inputs = {"input_ids": torch.randint(3, 60, (2, 8))}
    if name != "FNet":  # which mixes all tokens
        inputs["attention_mask"] = torch.ones(2, 8, dtype=torch.long)
    return Sample(module, inputs, "8 tokens")


def _pictures(name: str, options: Options) -> Sample:
    side = options.get("image_size", 64)
    module = _build(name, "ImageClassification", options)
    return Sample(module, {"pixel_values": torch.randn(2, 3, side, side)}, f"{side} px")


def _sounds(name: str, options: Options) -> Sample:
    module = _build(name, "SequenceClassification", options)
    return Sample(module, {"input_values": torch.randn(2, 400)}, "400 samples")


def _video(name: str, options: Options) -> Sample:
    module = _build(name, "VideoClassification", options)
    return Sample(module, {"pixel_values": torch.randn(2, 4, 3, 32, 32)}, "4 frames of 32 px")


def _spectrum(name: str, options: Options) -> Sample:
    module = _build(name, "AudioClassification", options)
    return Sample(module, {"input_values": torch.randn(2, 32, 16)}, "32 x 16")


def _t5() -> Sample:
    library = import_module("transformers")
    config = library.T5Config(vocab_size=60, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    return Sample(
        library.T5EncoderModel(config), {"input_ids": torch.randint(3, 60, (2, 8))}, "8 tokens"
    )
