"""Small models of many architectures, built from their configurations with random weights, and batches for them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpq.core.errors import MpqError
from mpq.network.calibration import Batch, LossFn, cross_entropy, next_token_loss, seeded
from mpq.network.distance import distance_loss, with_targets
from mpq.network.experts import unstack

WIDTH, HIDDEN, BLOCKS, HEADS, WORDS, TIME, SAMPLES = 64, 96, 2, 4, 160, 12, 4
LLAMA = {
    "vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BERT = {
    key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "bos_token_id", "eos_token_id")
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
GPT = {"vocab_size": WORDS, "n_embd": WIDTH, "n_layer": BLOCKS, "n_head": HEADS, "n_positions": 64}
IMAGES = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS}
STAGES = {"depths": [1, 1, 2, 1], "hidden_sizes": [16, 24, 32, 48]}
SEQ2SEQ = {
    "vocab_size": WORDS, "d_model": WIDTH, "encoder_layers": BLOCKS, "decoder_layers": BLOCKS,
    "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": HIDDEN,
    "decoder_ffn_dim": HIDDEN, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 2,
}  # fmt: skip
TEXT_TOWER = {**BERT, "projection_dim": 32, "bos_token_id": 1, "eos_token_id": 2}
IMAGE_TOWER = {**IMAGES, "image_size": 32, "patch_size": 8}


@dataclass(frozen=True)
class Case:
    """A model and data for it."""

    name: str
    build: Callable[[], nn.Module]
    batches: Callable[[nn.Module], tuple[Batch, ...]]
    loss_fn: LossFn


def _seeded_weights(model: nn.Module) -> nn.Module:
    """Scale random weights so that activations keep their magnitude; seeded by name. Norms and statistics stay."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and parameter.is_floating_point():
                fan = parameter[0].numel() if "embed" not in name else 4
                parameter.copy_(torch.randn(parameter.shape, generator=seeded(0, name)) / fan**0.5)
    return model.eval()


def _transformers(config: str, model: str, settings: Mapping[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        declare_vision_operators()
        transformers = import_module("transformers")
        torch.manual_seed(0)
        made = getattr(transformers, model)._from_config(getattr(transformers, config)(**settings))
        made.config.architectures = [model]
        return unstack(_seeded_weights(made))

    return build


def _timm(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        made: nn.Module = import_timm().create_model(name, pretrained=False, num_classes=10, **settings)
        for parameter in made.parameters():
            if parameter.ndim > 1 and not parameter.any():  # a head of zeros lets no gradient through
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        return made.eval()

    return build


def import_timm() -> Any:
    """timm; MpqError with the reason where it cannot be imported."""
    try:
        declare_vision_operators()
        return import_module("timm")
    except (ImportError, RuntimeError) as error:
        raise MpqError(f"timm cannot be imported ({error}): pip install --no-deps timm torchvision") from error


def declare_vision_operators() -> None:
    """Let torchvision be imported even if its operators were compiled for another torch; nothing here calls them."""
    if find_spec("torchvision") is None:
        return
    try:
        import_module("torchvision")
    except RuntimeError:
        operators = torch.library.Library("torchvision", "FRAGMENT")
        regions = ("roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool", "deform_conv2d")
        for name in ("nms", "qnms", *regions, *(f"_{region}_backward" for region in regions)):
            operators.define(f"{name}() -> ()")
        globals()["_operators"] = operators  # registrations last as long as the library object
        import_module("torchvision")


def _tokens(index: int, time: int = TIME) -> Tensor:
    return torch.randint(3, WORDS, (SAMPLES, time), generator=seeded(1, "tokens", index))


def _pictures(index: int, size: int) -> Tensor:
    return torch.randn(SAMPLES, 3, size, size, generator=seeded(1, "images", index))


def _causal(model: nn.Module) -> tuple[Batch, ...]:
    return tuple(_tokens(index) for index in range(2))


def _distance(make: Callable[[int], Mapping[str, Any]]) -> Callable[[nn.Module], tuple[Batch, ...]]:
    return lambda model: with_targets(model, [make(index) for index in range(2)], noise=True)


def _masked(index: int) -> dict[str, Tensor]:
    mask = torch.ones(SAMPLES, TIME, dtype=torch.int64)
    mask[0, 8:] = 0
    return {"input_ids": _tokens(index), "attention_mask": mask}


def _two_towers(index: int) -> dict[str, Tensor]:
    return {**_masked(index), "pixel_values": _pictures(index, 32)}


def _pixels(size: int) -> Callable[[int], Mapping[str, Any]]:
    return lambda index: {"pixel_values": _pictures(index, size)}


def _labelled(size: int) -> Callable[[nn.Module], tuple[Batch, ...]]:
    return lambda model: tuple(
        (_pictures(index, size), torch.randint(0, 10, (SAMPLES,), generator=seeded(2, index))) for index in range(2)
    )


def _translated(model: nn.Module) -> tuple[Batch, ...]:
    return tuple({**_masked(index), "labels": _tokens(index + 7)} for index in range(2))


def _spoken(model: nn.Module) -> tuple[Batch, ...]:
    sound = [torch.randn(SAMPLES, 16, 64, generator=seeded(1, "sound", index)) for index in range(2)]
    return tuple({"input_features": heard, "labels": _tokens(index)} for index, heard in enumerate(sound))


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that the model computes from its labels."""
    loss: Tensor = model(**batch).loss
    return loss


def reconstruction(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy over ten classes per pixel."""
    inputs, classes = batch
    return functional.cross_entropy(model(inputs), classes)


class UNet(nn.Module):
    """Two levels down and up, with skips and transposed convolutions: (n, 3, h, w) -> (n, 10, h, w)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.down = self._pair(3, 16), nn.ModuleList([self._pair(16, 24), self._pair(24, 32)])
        self.rise = nn.ModuleList([nn.ConvTranspose2d(32, 24, 2, 2), nn.ConvTranspose2d(24, 16, 2, 2)])
        self.up, self.leave = nn.ModuleList([self._pair(48, 24), self._pair(32, 16)]), nn.Conv2d(16, 10, 1)

    @staticmethod
    def _pair(inner: int, outer: int) -> nn.Module:
        first, second = nn.Conv2d(inner, outer, 3, padding=1), nn.Conv2d(outer, outer, 3, padding=1)
        return nn.Sequential(first, nn.GroupNorm(4, outer), nn.SiLU(), second, nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        """Logits of every pixel."""
        skips = [self.enter(x)]
        for level in self.down:
            skips.append(level(functional.max_pool2d(skips[-1], 2)))
        x = skips.pop()
        for rise, level in zip(self.rise, self.up, strict=True):
            x = level(torch.cat([rise(x), skips.pop()], 1))
        return self.leave(x)


def _segmented(model: nn.Module) -> tuple[Batch, ...]:
    return tuple(
        (_pictures(index, 16), torch.randint(0, 10, (SAMPLES, 16, 16), generator=seeded(2, index)))
        for index in range(2)
    )


def _images(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(model, batch)


def _cases() -> dict[str, Case]:
    found: dict[str, Case] = {}

    def add(name: str, build: Callable[[], nn.Module], batches: Any, loss_fn: LossFn) -> None:
        found[name] = Case(name, build, batches, loss_fn)

    def causal(name: str, family: str, **settings: Any) -> None:
        head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
        add(name, _transformers(f"{family}Config", f"{family}{head}", settings), _causal, next_token_loss)

    for name, family in (
        ("Llama", "Llama"), ("Mistral", "Mistral"), ("Qwen2", "Qwen2"), ("OLMo 2", "Olmo2"), ("Granite", "Granite"),
        ("SmolLM3", "SmolLM3"), ("Phi-3", "Phi3"), ("StableLM", "StableLm"), ("Cohere", "Cohere"), ("GLM-4", "Glm4"),
    ):  # fmt: skip
        causal(name, family, **LLAMA)
    causal("Qwen3", "Qwen3", **LLAMA, head_dim=16)
    causal("Gemma 2", "Gemma2", **LLAMA, head_dim=16, sliding_window=8)
    gemma = {**LLAMA, "head_dim": 16, "sliding_window": 8}
    add("Gemma 3", _transformers("Gemma3TextConfig", "Gemma3ForCausalLM", gemma), _causal, next_token_loss)
    causal("Qwen3-MoE", "Qwen3Moe", **LLAMA, **EXPERTS, num_experts=4, head_dim=16)
    causal("Mixtral", "Mixtral", **LLAMA, num_local_experts=4, num_experts_per_tok=2)
    causal(
        "DeepSeek-V3", "DeepseekV3", **{**LLAMA, "num_key_value_heads": HEADS}, **EXPERTS, n_routed_experts=4,
        n_group=2, topk_group=1,
        q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16,
        first_k_dense_replace=1,
    )  # fmt: skip
    causal("gpt-oss", "GptOss", **LLAMA, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)
    causal("GPT-2", "GPT2", **GPT)
    causal("GPT-J", "GPTJ", **GPT, rotary_dim=8)
    causal("GPT-NeoX", "GPTNeoX", **{key: value for key, value in LLAMA.items() if key != "num_key_value_heads"})
    causal(
        "OPT", "OPT", vocab_size=WORDS, hidden_size=WIDTH, ffn_dim=HIDDEN, num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS, max_position_embeddings=64, word_embed_proj_dim=32,
    )  # fmt: skip
    causal("Bloom", "Bloom", vocab_size=WORDS, hidden_size=WIDTH, n_layer=BLOCKS, n_head=HEADS)
    causal("Falcon", "Falcon", vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=BLOCKS, num_attention_heads=HEADS)
    causal("Mamba", "Mamba", vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=BLOCKS, state_size=8)

    def encoder(name: str, family: str, settings: Mapping[str, Any], make: Any = _masked) -> None:
        add(name, _transformers(f"{family}Config", f"{family}Model", settings), _distance(make), distance_loss)

    encoder("BERT", "Bert", BERT)
    encoder("RoBERTa", "Roberta", BERT)
    encoder("DistilBERT", "DistilBert", {
        "vocab_size": WORDS, "dim": WIDTH, "hidden_dim": HIDDEN, "n_layers": BLOCKS, "n_heads": HEADS,
        "max_position_embeddings": 64,
    })  # fmt: skip
    encoder("DeBERTa", "DebertaV2", {
        **BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
        "max_relative_positions": 16,
    })  # fmt: skip
    encoder("ModernBERT", "ModernBert", {**BERT, "local_attention": 8})
    encoder("ELECTRA", "Electra", {**BERT, "embedding_size": 32})
    encoder("DINOv2", "Dinov2", {**IMAGES, "image_size": 28, "patch_size": 14}, _pixels(28))
    encoder(
        "CLIP", "CLIP", {"text_config": TEXT_TOWER, "vision_config": IMAGE_TOWER, "projection_dim": 32}, _two_towers
    )
    encoder("SigLIP", "Siglip", {"text_config": TEXT_TOWER, "vision_config": IMAGE_TOWER}, _two_towers)
    encoder("Wav2Vec2", "Wav2Vec2", {
        **IMAGES, "conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "vocab_size": 32,
    }, lambda index: {"input_values": torch.randn(SAMPLES, 400, generator=seeded(1, index))})  # fmt: skip

    def seq2seq(name: str, config: str, model: str, settings: Mapping[str, Any], batches: Any = _translated) -> None:
        add(name, _transformers(config, model, settings), batches, own_loss)

    seq2seq("T5", "T5Config", "T5ForConditionalGeneration", {
        "vocab_size": WORDS, "d_model": WIDTH, "d_ff": HIDDEN, "num_layers": BLOCKS, "num_heads": HEADS, "d_kv": 16,
        "decoder_start_token_id": 0,
    })  # fmt: skip
    seq2seq("BART", "BartConfig", "BartForConditionalGeneration", SEQ2SEQ)
    seq2seq("Whisper", "WhisperConfig", "WhisperForConditionalGeneration", {
        **SEQ2SEQ, "num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 64,
    }, _spoken)  # fmt: skip

    def classifier(name: str, family: str, settings: Mapping[str, Any], size: int = 32) -> None:
        build = _transformers(f"{family}Config", f"{family}ForImageClassification", {**settings, "num_labels": 10})
        add(name, build, _labelled(size), _images)

    classifier("ViT", "ViT", {**IMAGES, "image_size": 32, "patch_size": 8})
    classifier("DeiT", "DeiT", {**IMAGES, "image_size": 32, "patch_size": 8})
    classifier("Swin", "Swin", {
        "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4,
    })  # fmt: skip
    classifier("ConvNeXt", "ConvNext", STAGES, 64)
    classifier("ResNet (transformers)", "ResNet", {**STAGES, "embedding_size": 16, "layer_type": "basic"}, 64)
    resnet = {**STAGES, "embedding_size": 16, "layer_type": "basic", "model_type": "resnet", "out_features": ["stage4"]}
    transformer = {key: size for key, size in SEQ2SEQ.items() if key.endswith(("layers", "heads", "_dim", "d_model"))}
    add("DETR", _transformers("DetrConfig", "DetrModel", {
        **transformer,
        "num_queries": 5, "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
        "backbone_config": resnet,
    }), _distance(_pixels(64)), distance_loss)  # fmt: skip

    for name, model, settings in (
        ("timm ResNet", "resnet18", {}), ("timm EfficientNet", "efficientnet_b0", {}),
        ("timm tf_EfficientNet (same padding)", "tf_efficientnet_b0", {}),
        ("timm MobileNetV3", "mobilenetv3_small_050", {}),
        ("timm ConvNeXt", "convnext_atto", {}), ("timm ViT", "vit_tiny_patch16_224", {"img_size": 64}),
        ("timm MLP-Mixer", "mixer_s32_224", {"img_size": 64}), ("timm NFNet (standardized weights)", "nfnet_l0", {}),
    ):  # fmt: skip
        add(name, _timm(model, **settings), _labelled(64), _images)
    add("U-Net", lambda: _seeded_weights(UNet()), _segmented, reconstruction)
    return found


CASES = _cases()
QUICK = ("Llama", "Gemma 3", "Mixtral", "GPT-2", "BERT", "T5", "ViT", "ConvNeXt")
SAMPLED = (*QUICK, "Whisper", "CLIP", "DeBERTa", "U-Net")  # run by the tests
