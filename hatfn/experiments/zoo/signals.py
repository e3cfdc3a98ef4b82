"""Networks for sequences: x_transformers, torchaudio, braindecode, torchcrepe and resemblyzer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from hatfn.experiments.rows import Sample

Models = Mapping[str, Callable[[], Sample]]


def x_transformers() -> Models:
    """Transformers of 64 features and two layers, with some of the many options."""
    options: dict[str, dict[str, Any]] = {
        "Decoder": {},
        "Decoder with rotary positions": {"rotary_pos_emb": True},
        "Decoder with ALiBi": {"alibi_pos_bias": True},
        "Decoder with relative positions": {"rel_pos_bias": True},
        "Decoder with gated linear units": {"ff_glu": True, "ff_swish": True},
        "Decoder with RMSNorm": {"use_rmsnorm": True, "attn_qk_norm": True},
        "Decoder with one key": {"attn_one_kv_head": True},
        "Decoder with talking heads": {"attn_pre_talking_heads": True, "attn_post_talking_heads": True},
        "Decoder with gated residuals": {"gate_residual": True},
        "Decoder with sandwich norms": {"sandwich_norm": True},
        "Decoder with memory keys": {"attn_num_mem_kv": 4},
    }
    found = {name: partial(_decoder, **chosen) for name, chosen in options.items()}
    return found | {"Encoder of images": _image_encoder, "Encoder of numbers": _continuous_encoder}


TRUNK: dict[str, Any] = {"dim": 64, "depth": 2, "heads": 4, "attn_dim_head": 16}


def _decoder(**options: Any) -> Sample:
    library = import_module("x_transformers")
    layers = library.Decoder(**TRUNK, **options)
    module = library.TransformerWrapper(num_tokens=50, max_seq_len=16, attn_layers=layers)
    return Sample(module, _tokens(), "16 tokens")


def _image_encoder() -> Sample:
    library = import_module("x_transformers")
    module = library.ViTransformerWrapper(
        image_size=32, patch_size=4, num_classes=4, attn_layers=library.Encoder(**TRUNK)
    )
    return Sample(module, torch.randn(2, 3, 32, 32), "32 px")


def _continuous_encoder() -> Sample:
    library = import_module("x_transformers")
    module = library.ContinuousTransformerWrapper(
        dim_in=8, dim_out=4, max_seq_len=16, attn_layers=library.Encoder(**TRUNK)
    )
    return Sample(module, torch.randn(2, 16, 8), "16 steps")


def _tokens(length: int = 16, words: int = 50) -> Tensor:
    return torch.randint(words, (2, length))


def torchaudio() -> Models:
    """Speech recognition, separation and quality."""
    layers = {"encoder_embed_dim": 64, "encoder_num_layers": 2, "encoder_num_heads": 4}
    return {
        "DeepSpeech": partial(
            _audio, "DeepSpeech", (1, 20, 8), head="out", n_feature=8, n_hidden=64, n_class=5
        ),
        "Wav2Letter": partial(_audio, "Wav2Letter", (1, 1600), head=False, num_classes=5),
        "ConvTasNet": partial(
            _audio,
            "ConvTasNet",
            (1, 400),
            enc_num_feats=32,
            msk_num_feats=32,
            msk_num_hidden_feats=64,
            msk_num_layers=2,
            msk_num_stacks=2,
        ),
        "Conformer": partial(
            _conformer,
            input_dim=64,
            num_heads=4,
            ffn_dim=128,
            num_layers=2,
            depthwise_conv_kernel_size=5,
        ),
        "WaveRNN": partial(
            _wavernn,
            upsample_scales=(2, 2),
            n_classes=8,
            hop_length=4,
            n_res_block=2,
            n_rnn=64,
            n_fc=64,
            n_freq=16,
            n_hidden=32,
            n_output=32,
        ),
        "HDemucs": partial(
            _audio,
            "HDemucs",
            (2, 2048),
            sources=["a", "b"],
            channels=8,
            nfft=256,
            depth=3,
            dconv_attn=4,
        ),
        "Wav2Vec2": partial(_wav2vec2, "group_norm", **layers),
        "Wav2Vec2 with layer norms": partial(_wav2vec2, "layer_norm", **layers),
    }


def _audio(name: str, size: tuple[int, ...], head: Any = None, **options: Any) -> Sample:
    module = getattr(import_module("torchaudio.models"), name)(**options)
    return Sample(module, torch.randn(2, *size), " x ".join(map(str, size)), head=head)


def _conformer(**options: Any) -> Sample:
    module = import_module("torchaudio.models").Conformer(**options)
    inputs = (torch.randn(2, 12, 64), torch.tensor([12, 9]))
    return Sample(module, inputs, "12 steps")


def _wavernn(**options: Any) -> Sample:
    module = import_module("torchaudio.models").WaveRNN(**options)
    steps = (10 - options.get("kernel_size", 5) + 1) * options["hop_length"]
    return Sample(module, (torch.randn(2, 1, steps), torch.randn(2, 1, 16, 10)), f"{steps} steps")


def _wav2vec2(mode: str, **options: Any) -> Sample:
    module = import_module("torchaudio.models").wav2vec2_model(
        extractor_mode=mode,
        extractor_conv_layer_config=[(32, 10, 5), (32, 3, 2), (32, 3, 2)],
        extractor_conv_bias=False,
        encoder_projection_dropout=0.0,
        encoder_pos_conv_kernel=8,
        encoder_pos_conv_groups=4,
        encoder_attention_dropout=0.0,
        encoder_ff_interm_features=128,
        encoder_ff_interm_dropout=0.0,
        encoder_dropout=0.0,
        encoder_layer_norm_first=mode == "layer_norm",
        encoder_layer_drop=0.0,
        aux_num_out=5,
        **options,
    )
    return Sample(module, torch.randn(2, 400), "400 samples")


def braindecode() -> Models:
    """Classifiers of electroencephalograms: 22 channels, four seconds of 250 values."""
    names = (
        "ATCNet", "AttentionBaseNet", "BDTCN", "BIOT", "CTNet", "ContraWR", "Deep4Net",
        "EEGConformer", "EEGITNet", "EEGInceptionERP", "EEGInceptionMI", "EEGNeX", "EEGNet",
        "EEGSimpleConv", "EEGTCNet", "FBCNet", "FBLightConvNet", "FBMSNet", "IFNet", "MSVTNet",
        "SCCNet", "SPARCNet", "ShallowFBCSPNet", "SincShallowNet", "SleepStagerBlanco2020",
        "SleepStagerChambon2018", "SyncNet", "TIDNet", "TSception", "MEDFormer", "PBT",
        "TCFormer",
    )  # fmt: skip
    found = {name: partial(_brain, name) for name in names}
    found["Labram"] = partial(_brain, "Labram", (128, 400))
    for name in ("ShallowFBCSPNet", "Deep4Net"):  # their classifiers are wide convolutions
        found[name] = partial(_brain, name, head="final_layer.conv_classifier")
    return found


def _brain(
    name: str, size: tuple[int, int] = (22, 1000), head: str | None = None, **options: Any
) -> Sample:
    channels, length = size
    module = getattr(import_module("braindecode.models"), name)(
        n_chans=channels, n_outputs=4, n_times=length, sfreq=250, **options
    )
    return Sample(module, torch.randn(2, *size), f"{channels} x {length}", head=head)


def torchcrepe() -> Models:
    """The small estimator of pitch."""
    return {"tiny": _crepe}


def _crepe() -> Sample:
    module = import_module("torchcrepe").Crepe("tiny")
    return Sample(module, torch.randn(2, 1024), "1024 samples", head="classifier")  # ends in a sigmoid


def resemblyzer() -> Models:
    """The encoder of voices."""
    return {"VoiceEncoder": _voice_encoder}


def _voice_encoder() -> Sample:
    library = import_module("resemblyzer.voice_encoder")
    module = library.VoiceEncoder(device="cpu", verbose=False)
    for layer in (module.lstm, module.linear):
        layer.reset_parameters()  # the package comes with trained weights
    return Sample(module, torch.randn(2, 20, 40), "20 steps")
