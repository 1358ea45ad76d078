"""Models of other people's packages, tiny: how each is built, what it is given, and how many blocks it has."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Case(NamedTuple):
    """A model of a package.

    Attributes:
        build: makes it.
        example: makes what it is given.
        attentions: how many attentions are cut, at least.
        mlps: the same for MLPs.
    """

    build: Callable[[], nn.Module]
    example: Callable[[], Any]
    attentions: int
    mlps: int


def drawn(*shape: int) -> Tensor:
    return torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def words(length: int = 12, many: int = 50) -> Tensor:
    return torch.randint(0, many, (2, length), generator=torch.Generator().manual_seed(0))


def image() -> Tensor:
    return drawn(3, 64, 64)


def film() -> Tensor:
    return drawn(3, 4, 64, 64)


# -- vit-pytorch ------------------------------------------------------------------------------------------------------

HEADS: dict[str, Any] = {"dim": 48, "heads": 3, "mlp_dim": 96, "dim_head": 16}
VIT: dict[str, Any] = {**HEADS, "image_size": 64, "patch_size": 16, "num_classes": 5, "depth": 2}
VIDEO: dict[str, Any] = {**HEADS, "image_size": 64, "image_patch_size": 16, "frames": 4, "frame_patch_size": 2}
VIDEO["num_classes"] = 5
SERIES: dict[str, Any] = {**HEADS, "seq_len": 64, "patch_size": 8, "num_classes": 5, "depth": 2}
ROOM: dict[str, Any] = {**HEADS, "ndim": 3, "input_shape": (4, 16, 16), "patch_size": (2, 8, 8), "num_classes": 5}
ROOM |= {"depth": 2, "dim_head": 24}
LEVIT: dict[str, Any] = {"image_size": 64, "num_classes": 5, "stages": 2, "dim": (32, 48), "depth": 2, "heads": (2, 3)}
LEVIT |= {"mlp_mult": 2, "dim_key": 8, "dim_value": 16}
CVT = {f"s{n}_{name}": value for n in (1, 2, 3) for name, value in (("emb_dim", 16 * n), ("depth", 1), ("heads", n))}
MAXVIT: dict[str, Any] = {"num_classes": 5, "dim_conv_stem": 16, "dim": 16, "dim_head": 8, "depth": (1, 1)}
TWINS = {f"s{n}_{name}": value for n in (1, 2, 3, 4) for name, value in (("emb_dim", 16 * n), ("depth", 1))}
TWINS |= {f"s{n}_{name}": 2 for n in (1, 2, 3, 4) for name in ("patch_size", "local_patch_size", "global_k")}
MOBILE: dict[str, Any] = {"image_size": (64, 64), "dims": [16, 24, 32], "num_classes": 5}
MOBILE["channels"] = [8, 8, 16, 16, 24, 24, 32, 32, 40, 40, 48]
LOCAL: dict[str, Any] = {**VIT, "patch_size": 4, "dim": 16, "heads": 2, "mlp_dim": 24, "dim_head": 12}
CROSS: dict[str, Any] = {"image_size": 64, "num_classes": 5, "depth": 1, "cross_attn_depth": 1, "cross_attn_heads": 3}
CROSS |= {"sm_dim": 32, "sm_patch_size": 8, "sm_enc_depth": 1, "sm_enc_heads": 2, "sm_enc_mlp_dim": 64}
CROSS |= {"lg_dim": 48, "lg_patch_size": 16, "lg_enc_depth": 1, "lg_enc_heads": 3, "lg_enc_mlp_dim": 96}
CROSS |= {"sm_enc_dim_head": 16, "lg_enc_dim_head": 16, "cross_attn_dim_head": 16}
LOOK: dict[str, Any] = {"dim": 48, "image_size": 64, "num_classes": 5, "depth": 2, "heads": 3, "dim_head": 16}
LOOK |= {"highres_patch_size": 8, "cross_attn_heads": 3, "cross_attn_dim_head": 16}
NEST: dict[str, Any] = {"image_size": 64, "patch_size": 4, "num_classes": 5, "dim": 16, "heads": 2, "dim_head": 8}
NEST |= {"num_hierarchies": 3, "block_repeats": (1, 1, 1)}
CCT: dict[str, Any] = {"embedding_dim": 48, "n_conv_layers": 2, "num_layers": 2, "num_heads": 3, "mlp_ratio": 2.0}
CCT |= {"num_classes": 5, "positional_embedding": "learnable"}
LOOPED: dict[str, Any] = {**HEADS, "num_classes": 5, "image_size": 64, "patch_size": 16, "loop_depth": 2}
LOOPED |= {"pre_loop_depth": 1, "num_looped_blocks": 1, "post_loop_depth": 1}
REGION: dict[str, Any] = {"dim": (16, 16, 32, 32), "depth": (1, 1, 1, 1), "window_size": 2, "num_classes": 5}
SCALABLE: dict[str, Any] = {"num_classes": 5, "dim": 16, "depth": (1, 1, 1, 1), "heads": (1, 2, 2, 2)}
SCALABLE |= {"reduction_factor": (4, 2, 2, 1), "window_size": (4, 2, 2, None), "iwsa_dim_key": 8, "iwsa_dim_value": 8}
SCALABLE |= {"ssa_dim_key": 8, "ssa_dim_value": 8}
T2T: dict[str, Any] = {**VIT, "t2t_layers": ((7, 4), (3, 2), (3, 2))}
del T2T["patch_size"]


def vit(
    module: str, kind: str, sizes: dict[str, Any], attentions: int = 2, mlps: int = 2, given: Any = image
) -> tuple[str, Case]:
    def build() -> nn.Module:
        made: nn.Module = getattr(import_module(f"vit_pytorch.{module}"), kind)(**sizes)
        return made.double()

    return module, Case(build, given, attentions, mlps)


VITS = dict(
    [
        vit("vit", "ViT", VIT),
        vit("simple_vit", "SimpleViT", VIT),
        vit("deepvit", "DeepViT", VIT),
        vit("cait", "CaiT", {**VIT, "cls_depth": 1}, 3, 3),
        vit("parallel_vit", "ViT", VIT, 4, 4),
        vit("simple_vit_with_qk_norm", "SimpleViT", VIT),
        vit("vit_for_small_dataset", "ViT", VIT),
        vit("xcit", "XCiT", {**VIT, "cls_depth": 1}, 3, 3),
        vit("levit", "LeViT", LEVIT, 5, 5),
        vit("local_vit", "LocalViT", LOCAL),
        vit("cvt", "CvT", {**CVT, "num_classes": 5}, 3, 3),
        vit("max_vit", "MaxViT", {**MAXVIT, "window_size": 4}, 4, 4),
        vit("twins_svt", "TwinsSVT", {**TWINS, "num_classes": 5}, 8, 8),
        vit("mobile_vit", "MobileViT", MOBILE, 9, 9),
        vit("max_vit_with_registers", "MaxViT", {**MAXVIT, "window_size": 4}, 4, 4),
        vit("learnable_memory_vit", "ViT", VIT),
        vit("mp3", "ViT", VIT),
        vit("simple_flash_attn_vit", "SimpleViT", VIT),
        vit("simple_uvit", "SimpleUViT", VIT),
        vit("simple_vit_attn_residual", "SimpleViTAttnResidual", VIT),
        vit("simple_vit_orthog_residual_update", "SimpleViT", VIT),
        vit("simple_vit_with_patch_dropout", "SimpleViT", VIT),
        vit("simple_vit_with_register_tokens", "SimpleViT", VIT),
        vit("simple_vit_with_relative_proj_pos_bias", "SimpleViT", VIT),
        vit("simple_vit_with_specialized_cls", "SimpleViT", VIT),
        vit("simple_vit_with_hyper_connections", "SimpleViT", {**VIT, "num_residual_streams": 3}),
        vit("simple_vit_with_fft", "SimpleViT", {**VIT, "freq_patch_size": 16}),
        vit("vat", "ViT", VIT),
        vit("vit_5", "ViT", VIT),
        vit("vit_detpool", "ViTDetPool", VIT),
        vit("vit_with_decorr", "ViT", VIT),
        vit("vit_with_keel_post_ln", "ViT", VIT),
        vit("vit_with_patch_dropout", "ViT", VIT),
        vit("vit_with_patch_merger", "ViT", VIT),
        vit("normalized_vit", "nViT", VIT),
        vit("attn_residual_with_dca_simple_vit", "SimpleViT", VIT),
        vit("jumbo_vit", "JumboViT", VIT),
        vit("jet_vit", "JetViT", {**VIT, "window_size": 2, "attn_layers": ["WA", "LA"]}),
        vit("cross_vit", "CrossViT", CROSS, 4, 2),
        vit("look_vit", "LookViT", LOOK, 4, 4),
        vit("looped_vit", "LoopedViT", LOOPED, 3, 3),
        vit("nest", "NesT", NEST, 3, 3),
        vit("pit", "PiT", {**VIT, "depth": (1, 1)}),
        vit("regionvit", "RegionViT", REGION, 4, 4),
        vit("scalable_vit", "ScalableViT", SCALABLE, 4, 4),
        vit("t2t", "T2TViT", T2T),
        vit("cct", "CCT", {**CCT, "img_size": (64, 64)}),
        vit("cct_3d", "CCT", {**CCT, "img_size": 64, "num_frames": 4}, given=film),
        vit("simple_flash_attn_vit_3d", "SimpleViT", {**VIDEO, "depth": 2}, given=film),
        vit("simple_vit_3d", "SimpleViT", {**VIDEO, "depth": 2}, given=film),
        vit("vit_3d", "ViT", {**VIDEO, "depth": 2}, given=film),
        vit("vivit", "ViViT", {**VIDEO, "spatial_depth": 1, "temporal_depth": 1}, given=film),
        vit("vivit_with_moss", "ViViT", {**VIDEO, "spatial_depth": 1, "temporal_depth": 1}, given=film),
        vit("simple_vit_1d", "SimpleViT", SERIES, given=lambda: drawn(3, 64)),
        vit("vit_1d", "ViT", SERIES, given=lambda: drawn(3, 64)),
        vit("vit_nd", "ViTND", ROOM, given=lambda: drawn(3, 4, 16, 16)),
        vit("vit_nd_pope", "ViTND", ROOM, given=lambda: drawn(3, 4, 16, 16)),
        vit("na_vit", "NaViT", VIT, given=lambda: ([[image()[0], image()[1, :, :32, :32]], [image()[1, :, :32]]],)),
        # Of these the MLPs alone are cut.
        vit("simple_vit_with_value_residual", "SimpleViT", VIT, 0),
        vit("rvt", "RvT", VIT, 0),
        vit("vit_nd_rotary", "ViTND", ROOM, 0, given=lambda: drawn(3, 4, 16, 16)),
    ]
)

# -- x-transformers ---------------------------------------------------------------------------------------------------


def decoder(*, encoder: bool = False, **settings: Any) -> nn.Module:
    made = import_module("x_transformers")
    layers = (made.Encoder if encoder else made.Decoder)(dim=48, depth=2, heads=4, attn_dim_head=16, **settings)
    model: nn.Module = made.TransformerWrapper(num_tokens=50, max_seq_len=16, num_memory_tokens=3, attn_layers=layers)
    return model.double()


def vision() -> nn.Module:
    made = import_module("x_transformers")
    layers = made.Encoder(dim=48, depth=2, heads=4, attn_dim_head=16)
    model: nn.Module = made.ViTransformerWrapper(image_size=32, patch_size=8, num_classes=5, attn_layers=layers)
    return model.double()


class Captioner(nn.Module):
    """An image encoder, and a decoder that attends to it."""

    def __init__(self) -> None:
        super().__init__()
        self.sees, self.tells = vision(), decoder(cross_attend=True)

    def forward(self, pixels: Tensor, text: Tensor) -> Tensor:
        described: Tensor = self.tells(text, context=self.sees(pixels, return_embeddings=True))
        return described


def both() -> nn.Module:
    sizes = {"num_tokens": 50, "depth": 1, "heads": 4, "attn_dim_head": 16, "max_seq_len": 16}
    sides = {f"{side}_{name}": value for side in ("enc", "dec") for name, value in sizes.items()}
    model: nn.Module = import_module("x_transformers").XTransformer(dim=48, **sides)
    return model.double()


def text(attentions: int = 2, mlps: int = 2, **settings: Any) -> Case:
    return Case(lambda: decoder(**settings), words, attentions, mlps)


X_TRANSFORMERS = {
    "plain": text(),
    "encoder": text(encoder=True),
    "rotary": text(rotary_pos_emb=True),
    "grouped": text(attn_kv_heads=2),
    "one key-value head": text(attn_one_kv_head=True),
    "gated": text(ff_glu=True, ff_swish=True, ff_no_bias=True),
    "squared": text(ff_relu_squared=True),
    "flash": text(attn_flash=True),
    "flash, grouped, rotary": Case(lambda: decoder(attn_flash=True, attn_kv_heads=2, rotary_pos_emb=True), words, 0, 2),
    "memory": text(encoder=True, attn_num_mem_kv=4),
    "root mean squares": text(use_rmsnorm=True),
    "normalised": text(attn_qk_norm=True),
    "normalised, scaled": text(attn_qk_norm=True, attn_qk_norm_dim_scale=True),
    "relative": text(rel_pos_bias=True),
    "alibi": text(alibi_pos_bias=True, alibi_num_heads=2),
    "sandwich": text(sandwich_norm=True),
    "macaron": text(mlps=4, macaron=True),
    "gated values": text(attn_gate_values=True),
    "scaled heads": text(attn_head_scale=True),
    "attention on attention": text(attn_on_attn=True),
    "shifted": text(shift_tokens=1),
    "hyper connections": text(num_residual_streams=3),
    "narrow values": text(attn_value_dim_head=8),
    "vision": Case(vision, lambda: drawn(3, 32, 32), 2, 2),
    "encoder and decoder": Case(both, lambda: (words(), words(11)), 3, 2),
    "captions": Case(Captioner, lambda: (drawn(3, 32, 32), words()), 6, 4),
}

# -- torchvision, and torch itself ------------------------------------------------------------------------------------


def swin(version: int) -> nn.Module:
    kinds = import_module("torchvision.models.swin_transformer")
    sizes: dict[str, Any] = {"patch_size": [4, 4], "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4]}
    if version == 2:
        sizes |= {"block": kinds.SwinTransformerBlockV2, "downsample_layer": kinds.PatchMergingV2}
    model: nn.Module = kinds.SwinTransformer(window_size=[4, 4], num_classes=5, **sizes)
    return model.double()


def plain_vision() -> nn.Module:
    kind = import_module("torchvision.models").VisionTransformer
    sizes = {"num_layers": 2, "num_heads": 3, "hidden_dim": 48, "mlp_dim": 96, "num_classes": 5}
    model: nn.Module = kind(image_size=32, patch_size=8, **sizes)
    return model.double()


def max_vision() -> nn.Module:
    sizes: dict[str, Any] = {"block_channels": [16, 32], "block_layers": [1, 1], "head_dim": 8, "num_classes": 5}
    kind = import_module("torchvision.models").MaxVit
    model: nn.Module = kind((64, 64), 16, 2, stochastic_depth_prob=0.0, **sizes)
    return model.double()


def multiscale(second: bool) -> nn.Module:
    kinds = import_module("torchvision.models.video.mvit")
    rows = [(2, 32, 32, [1, 1, 1], [1, 2, 2]), (2, 32, 64, [1, 2, 2], [1, 1, 1]), (4, 64, 64, [1, 1, 1], [1, 1, 1])]
    blocks = [kinds.MSBlockConfig(h, i, o, [3, 3, 3], [3, 3, 3], q, kv) for h, i, o, q, kv in rows]
    switches = dict.fromkeys(("residual_pool", "rel_pos_embed", "proj_after_attn"), second)
    model: nn.Module = kinds.MViT((32, 32), 4, blocks, residual_with_cls_embed=False, num_classes=5, **switches)
    return model.double()


def layers(kind: str, *sizes: int, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(nn, kind)(24, 3, *sizes, 48, batch_first=True, **settings).double()


LIBRARIES = {
    "torchvision ViT": Case(plain_vision, lambda: drawn(3, 32, 32), 2, 2),
    "torchvision Swin": Case(lambda: swin(1), lambda: drawn(3, 32, 32), 4, 4),
    "torchvision Swin 2": Case(lambda: swin(2), lambda: drawn(3, 32, 32), 4, 4),
    "torchvision MaxViT": Case(max_vision, image, 4, 4),
    "torchvision MViT": Case(lambda: multiscale(False), lambda: drawn(3, 4, 32, 32), 0, 2),
    "torchvision MViT 2": Case(lambda: multiscale(True), lambda: drawn(3, 4, 32, 32), 0, 3),
    "encoder layer": Case(layers("TransformerEncoderLayer"), lambda: drawn(7, 24), 1, 1),
    "encoder layer, norm first": Case(
        layers("TransformerEncoderLayer", norm_first=True, activation="gelu"), lambda: drawn(7, 24), 1, 1
    ),
    "decoder layer": Case(layers("TransformerDecoderLayer"), lambda: (drawn(7, 24), drawn(5, 24)), 2, 1),
    "transformer": Case(layers("Transformer", 1, 1), lambda: (drawn(7, 24), drawn(5, 24)), 3, 2),
}
