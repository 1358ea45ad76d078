"""Groups of models that nobody here wrote: their attentions and MLPs are found, and cut right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import upop
from pruning.by_hand import check, difference
from pruning.gpts import NanoChat, NanoGPT
from pruning.packages import LIBRARIES, VITS, X_TRANSFORMERS, Case, drawn, words
from tiers import mostly_slow

pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages


def check_case(case: Case, folder: Path) -> None:
    torch.manual_seed(0)
    check(case.build(), case.example(), folder, case.attentions, case.mlps)


@pytest.mark.parametrize("name", mostly_slow(VITS, "vit"))
def test_vit_pytorch(name: str, tmp_path: Path) -> None:
    check_case(VITS[name], tmp_path)


@pytest.mark.parametrize("name", mostly_slow(X_TRANSFORMERS, "captions"))
def test_x_transformers(name: str, tmp_path: Path) -> None:
    pytest.importorskip("x_transformers", reason="x-transformers is not installed: pip install 'upop[dev]'")
    check_case(X_TRANSFORMERS[name], tmp_path)


@pytest.mark.parametrize("name", mostly_slow(LIBRARIES, "torchvision ViT", "transformer"))
def test_libraries(name: str, tmp_path: Path) -> None:
    check_case(LIBRARIES[name], tmp_path)


def test_tensors_made_of_tensors_are_refused_by_name() -> None:
    from vit_pytorch.na_vit_nested_tensor import NaViT

    sizes = {"image_size": 64, "patch_size": 16, "num_classes": 5, "dim": 48, "depth": 1, "heads": 3, "mlp_dim": 96}
    with pytest.raises(upop.errors.LayoutError, match="nested tensors"):
        upop.find_prunable(NaViT(**sizes), ([torch.randn(3, 64, 64), torch.randn(3, 32, 32)],))


# -- hand-written GPTs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", mostly_slow([True, False], True))
def test_a_gpt_in_the_style_of_nanogpt(fused: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    groups, _, _ = check(NanoGPT(fused=fused).double(), words(), tmp_path, 2, 2)
    assert [group.channel for group in groups] == ["dimension", "neuron"] * 2


@pytest.mark.parametrize(
    ("kv_groups", "repeated", "channel"),
    mostly_slow([(4, False, "group"), (4, True, "group"), (8, False, "head")], (4, True, "group")),
)
def test_a_gpt_in_the_style_of_nanochat(kv_groups: int, repeated: bool, channel: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    groups, _, _ = check(NanoChat(kv_groups=kv_groups, repeated=repeated).double(), words(), tmp_path, 2, 2)
    assert [group.channel for group in groups if group.kind == "attention"] == [channel] * 2


# -- OpenAI's ---------------------------------------------------------------------------------------------------------
# Whisper and CLIP compute their norms in float32, and cannot be had in float64.


@pytest.fixture
def precise(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have the norms of both packages take float64."""
    for package in ("whisper.model", "clip.model"):
        kind = pytest.importorskip(package, reason=f"{package} does not import: pip install 'upop[dev]'").LayerNorm
        monkeypatch.setattr(kind, "forward", nn.LayerNorm.forward)
    yield


def whisper() -> nn.Module:
    from whisper.model import ModelDimensions, Whisper

    torch.manual_seed(0)
    model = Whisper(ModelDimensions(8, 16, 48, 3, 2, 60, 14, 48, 3, 2))
    nn.init.normal_(model.decoder.positional_embedding)  # the package leaves what was in memory
    return model


def heard() -> tuple[Tensor, Tensor]:
    return drawn(8, 32), words(7, 60)


@pytest.mark.usefixtures("precise")
def test_whisper(tmp_path: Path) -> None:
    groups, masked, cut = check(whisper().double(), heard(), tmp_path, 6, 4)
    assert sum("cross_attn" in group.name for group in groups) == 2
    described = []
    for model in (masked, cut):
        # As whisper decodes: hooks keep the keys and values of what was said before.
        sound, text = model.embed_audio(heard()[0]), heard()[1]
        cache, hooks = model.install_kv_cache_hooks()
        with torch.no_grad():
            described.append(
                [model.decoder(text[:, at : at + 1], sound, kv_cache=cache) for at in range(text.shape[1])]
            )
        for hook in hooks:
            hook.remove()
        whole = model(*heard())
        assert difference([torch.cat(described[-1], 1)], [whole]) < 1e-10
    assert difference(*described) < 1e-10


def test_whisper_as_it_is() -> None:
    sound, text = heard()
    groups = upop.find_prunable(whisper(), (sound.float(), text)).groups
    assert sorted(group.kind for group in groups) == ["attention"] * 6 + ["mlp"] * 4


@pytest.mark.usefixtures("precise")
@pytest.mark.parametrize(("layers", "attentions", "mlps"), mostly_slow([(2, 4, 4), ((1, 1, 1, 1), 3, 2)], (2, 4, 4)))
def test_clip(layers: int | tuple[int, ...], attentions: int, mlps: int, tmp_path: Path) -> None:
    from clip.model import CLIP

    torch.manual_seed(0)
    transformer = isinstance(layers, int)
    model = CLIP(32, 32, layers, 128 if transformer else 8, 8 if transformer else None, 10, 60, 48, 3, 2)
    said = words(10, 58)
    said[:, -2] = 59
    groups, masked, cut = check(model.double(), (drawn(3, 32, 32), said), tmp_path, attentions, mlps)
    assert len({group.name.startswith("visual.") for group in groups}) == 2  # of a ResNet, its attention pool
    for encode in ("encode_image", "encode_text"):
        given = drawn(3, 32, 32) if encode == "encode_image" else said
        assert difference([getattr(masked, encode)(given)], [getattr(cut, encode)(given)]) < 1e-10
