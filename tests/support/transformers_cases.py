"""Ten transformers of tiny configurations, with inputs; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

TEXT = {"vocab_size": 50, "num_labels": 3}
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}

MODELS: dict[str, tuple[Callable[[Any], nn.Module], Any, str]] = {
    "bert": (
        hf.BertForSequenceClassification,
        hf.BertConfig(**TEXT, **WIDE, max_position_embeddings=32),
        "classifier",
    ),
    "roberta": (
        hf.RobertaForSequenceClassification,
        hf.RobertaConfig(**TEXT, **WIDE, max_position_embeddings=40),
        "classifier.out_proj",
    ),
    "distilbert": (
        hf.DistilBertForSequenceClassification,
        hf.DistilBertConfig(
            **TEXT, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=32
        ),
        "classifier",
    ),
    "electra": (
        hf.ElectraForSequenceClassification,
        hf.ElectraConfig(**TEXT, **WIDE, embedding_size=16, max_position_embeddings=32),
        "classifier.out_proj",
    ),
    "gpt2": (
        hf.GPT2ForSequenceClassification,
        hf.GPT2Config(**TEXT, n_embd=32, n_layer=2, n_head=2, n_positions=32, pad_token_id=0),
        "score",
    ),
    "llama": (
        hf.LlamaForSequenceClassification,
        hf.LlamaConfig(**TEXT, **WIDE, num_key_value_heads=1, max_position_embeddings=32, pad_token_id=0),
        "score",
    ),
    "vit": (
        hf.ViTForImageClassification,
        hf.ViTConfig(**WIDE, image_size=32, patch_size=8, num_labels=3),
        "classifier",
    ),
    "convnext": (
        hf.ConvNextForImageClassification,
        hf.ConvNextConfig(
            hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], image_size=32, num_labels=3
        ),
        "classifier",
    ),
    "resnet": (
        hf.ResNetForImageClassification,
        hf.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
        ),
        "classifier.1",
    ),
    "swin": (
        hf.SwinForImageClassification,
        hf.SwinConfig(
            image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4,
            num_labels=3,
        ),
        "classifier",
    ),
}  # fmt: skip
"""{name: (class, configuration, the classifier)}"""

WORDS = ("bert", "roberta", "distilbert", "electra", "gpt2", "llama")
"""Those that read words."""


def transformer(name: str, samples: int = 4) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with weights drawn here, and inputs; every second text has three padded tokens."""
    torch.manual_seed(0)
    make, config, _ = MODELS[name]
    model = make(config)
    if name not in WORDS:
        return model, {"pixel_values": torch.randn(samples, 3, 32, 32)}
    ids, mask = torch.randint(2, 50, (samples, 8)), torch.ones(samples, 8, dtype=torch.long)
    mask[1::2, 5:] = 0
    return model, {"input_ids": ids * mask, "attention_mask": mask}
