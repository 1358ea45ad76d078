"""timm's transformers, and what else of timm has their MLPs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
from timm import models
from torch import nn

from pruning.registry.architecture import Architecture, image

_PLAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def _row(name: str, size: int = 32, **sizes: Any) -> Architecture:
    return Architecture("timm", name, partial(timm.create_model, name, num_classes=7, **sizes), image(size))


def _own(name: str, make: Callable[..., nn.Module], size: int, **sizes: Any) -> Architecture:
    """A row for a class whose named models fix their sizes."""
    return Architecture("timm", name, partial(make, num_classes=7, **sizes), image(size))


_VISION_TRANSFORMERS = (
    *("vit_tiny_patch16_224", "vit_base_patch16_clip_224", "vit_base_patch32_clip_quickgelu_224"),
    *("vit_base_patch16_siglip_224", "vit_base_patch16_siglip_gap_256", "vit_so400m_patch14_siglip_224"),
    *("vit_base_patch16_rpn_224", "vit_medium_patch16_gap_240", "vit_little_patch16_reg1_gap_256"),
    *("vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_giant_patch14_dinov2"),
    *("vit_small_patch16_dinov3", "vit_small_plus_patch16_dinov3", "vit_7b_patch16_dinov3"),
    *("vit_pe_core_tiny_patch16_384", "vit_pe_lang_large_patch14_448", "vit_pe_spatial_tiny_patch16_512"),
    *("vit_so150m_patch16_reg4_gap_256", "vit_wee_patch16_reg1_gap_256", "vit_dwee_patch16_reg1_gap_256"),
    *("vit_base_patch16_18x2_224", "vit_xsmall_patch16_clip_224", "vit_intern300m_patch14_448"),
    *("vit_tiny_r_s16_p8_224", "vit_base_patch16_gap_224", "vit_base_patch16_224_miil"),
    *("vit_medium_patch16_rope_reg1_gap_256", "vit_small_patch16_rope_224", "vit_small_patch16_rope_ape_224"),
    *("vit_small_patch16_rope_mixed_224", "vit_relpos_small_patch16_224", "vit_srelpos_small_patch16_224"),
    *("vit_relpos_base_patch16_clsgap_224", "vit_relpos_medium_patch16_rpn_224", "naflexvit_base_patch16_gap"),
    *("deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"),
    *("beit_base_patch16_224", "beitv2_base_patch16_224", "eva02_tiny_patch14_224", "eva_giant_patch14_224"),
    *("samvit_base_patch16", "flexivit_small", "cait_xxs24_224", "xcit_nano_12_p8_224"),
    *("aimv2_large_patch14_224", "deepseek_vit_412m", "vit_base_patch16_xp_224"),
)
_WINDOWS = {"img_size": 64, "embed_dim": 24, "depths": (2, 2), "num_heads": (3, 3), "window_size": 4}
_FOUR = {"depths": (1, 1, 1, 1)}
_FOUR_WIDE = {**_FOUR, "embed_dims": (24, 24, 24, 24), "num_heads": (3, 3, 3, 3)}
_TNT = {"embed_dim": 24, "inner_dim": 12, "depth": 2, "num_heads_outer": 3, "num_heads_inner": 2}
_HIERA = {"img_size": 64, "embed_dim": 24, "num_heads": 1, "stages": (1, 1, 1, 1)}
_MIXER = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_blocks": 2}
_CROSS = {"img_size": 32, "img_scale": (1.0, 1.0), "patch_size": (8, 16), "mlp_ratio": (2.0, 2.0, 1.0)}

TIMM: tuple[Architecture, ...] = (
    *(_row(name, **_PLAIN) for name in _VISION_TRANSFORMERS),
    _row("convit_tiny", **{**_PLAIN, "depth": 3}, local_up_to_layer=1),
    *(_row(name, img_size=32, **_TNT) for name in ("tnt_s_patch16_224", "tnt_s_legacy_patch16_224")),
    *(
        _row(name, 64, img_size=64, base_dims=[8, 8, 8], depth=[1, 1, 1], heads=[2, 2, 2])
        for name in ("pit_ti_224", "pit_ti_distilled_224")
    ),
    *(
        _row(name, 64, **_WINDOWS)
        for name in (
            *("swin_tiny_patch4_window7_224", "swin_s3_tiny_224", "swinv2_tiny_window8_256"),
            *("swinv2_cr_tiny_224", "swinv2_cr_tiny_ns_224"),
        )
    ),
    *(_row(name, 64, img_size=64, **_FOUR_WIDE) for name in ("twins_pcpvt_small", "twins_svt_small")),
    *(_row(name, 64, **_FOUR_WIDE) for name in ("pvt_v2_b0", "pvt_v2_b2_li", "davit_tiny")),
    _row("coat_lite_tiny", 64, img_size=64, embed_dims=(24, 24, 24, 24), serial_depths=(1, 1, 1, 1)),
    *(_row(name, 64, **_HIERA) for name in ("hiera_tiny_224", "hiera_small_abswin_256")),
    *(_row(name, 64, **_FOUR, dims=(16, 16, 16, 16)) for name in ("convnext_atto", "inception_next_atto")),
    _row("edgenext_xx_small", 64, depths=(1, 2, 2, 2), dims=(24, 24, 24, 24)),
    _row("visformer_tiny", 64, img_size=64, embed_dim=48, depth=(1, 1, 1), num_heads=3),
    _row("mobilevit_xxs", 64),
    _row("sam2_hiera_tiny", 64, embed_dim=24, stages=(1, 1, 2, 1), global_att_blocks=(3,)),
    *(
        _row(name, 64, img_size=64, embed_dim=(24, 32, 48), key_dim=8, num_heads=(2, 3, 4), depth=(1, 1, 1))
        for name in ("levit_128s", "levit_conv_128s")
    ),
    _row("fastvit_sa12", 64, layers=(1, 1, 1, 1), embed_dims=(16, 32, 32, 64)),
    _row("repvit_m0_9", 64, depth=(1, 1, 1, 1), embed_dim=(16, 24, 32, 48)),
    _row("sequencer2d_s", 64, img_size=64, layers=(1,) * 4, embed_dims=(24,) * 4, hidden_sizes=(12,) * 4),
    _own("mixer", models.mlp_mixer.MlpMixer, 32, **_MIXER),
    _own("gmixer", models.mlp_mixer.MlpMixer, 32, **_MIXER, mlp_ratio=(1.0, 4.0), mlp_layer=models.mlp_mixer.GluMlp),
    _own(
        "metaformer",
        models.metaformer.MetaFormer,
        64,
        depths=(1, 1, 1, 1),
        dims=(16, 32, 32, 32),
        token_mixers=[*[models.metaformer.SepConv] * 2, *[models.metaformer.Attention] * 2],
        norm_layers=[*[models.metaformer.LayerNorm2dNoBias] * 2, *[models.metaformer.LayerNormNoBias] * 2],
    ),
    _own(
        "poolformer",
        models.metaformer.MetaFormer,
        64,
        depths=(1, 1, 1, 1),
        dims=(16, 32, 32, 32),
        norm_layers=models.metaformer.GroupNorm1,
        mlp_act=nn.GELU,
        use_mlp_head=False,
    ),
    _own("resmlp", models.mlp_mixer.MlpMixer, 32, **_MIXER, block_layer=models.mlp_mixer.ResBlock, mlp_ratio=4.0),
    _own(
        "gcvit",
        models.gcvit.GlobalContextVit,
        64,
        **{**_FOUR, "depths": (2, 2, 2, 2)},  # every second block alone reads the global queries
        img_size=64,
        embed_dim=16,
        num_heads=(2, 2, 2, 4),
        window_size=(4, 4, 4, 2),
    ),
    _own("focalnet", models.focalnet.FocalNet, 64, **_FOUR, embed_dim=24),
    _own(
        "mvitv2",
        models.mvitv2.MultiScaleVit,
        64,
        cfg=models.mvitv2.MultiScaleVitCfg(depths=(1, 1, 1, 1), embed_dim=24),
        img_size=64,
    ),
    _own("nest", models.nest.Nest, 64, img_size=64, embed_dims=(24,) * 3, num_heads=(2, 3, 3), depths=(1, 1, 1)),
    _own("volo", models.volo.VOLO, 64, layers=(1,) * 4, img_size=64, embed_dims=(24,) * 4, num_heads=(3,) * 4),
    _own(
        "tiny_vit",
        models.tiny_vit.TinyVit,
        64,
        **_FOUR,
        embed_dims=(16, 32, 32, 32),
        num_heads=(1, 2, 2, 2),
        window_sizes=(4, 4, 4, 4),
    ),
    _own(
        "crossvit",
        models.crossvit.CrossVit,
        32,
        **_CROSS,
        embed_dim=(24, 48),
        depth=((1, 2, 0), (1, 2, 0)),
        num_heads=(3, 3),
    ),
    _own(
        "maxvit",
        partial(
            models.maxxvit.MaxxVit,
            models.maxxvit.MaxxVitCfg(embed_dim=(32, 32), depths=(1, 1), block_type=("M", "M"), stem_width=16),
        ),
        64,
        img_size=64,
    ),
    _own(
        "coatnet",
        partial(
            models.maxxvit.MaxxVit,
            models.maxxvit.MaxxVitCfg(embed_dim=(16, 32), depths=(1, 1), block_type=("C", "T"), stem_width=16),
        ),
        64,
        img_size=64,
    ),
    _own(
        "efficientvit_mit",
        models.efficientvit_mit.EfficientVit,
        64,
        widths=(8, 16, 16, 32, 32),
        depths=(1, 1, 1, 1, 1),
        head_dim=8,
        head_widths=(64, 64),
    ),
)
