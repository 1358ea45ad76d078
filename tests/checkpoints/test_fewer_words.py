"""`upop convert --vocabulary`: a BLIP without the words that its texts never use answers alike, with its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from typer.testing import CliRunner

import upop
from upop.cli.app import app
from upop.data.tokenizer import load_tokenizer
from upop.errors import SettingError
from upop.models.caption import BlipCaption, CaptionConfig

_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_WORDS = [*_SPECIAL, "a", "red", "blue", "green", "circle", "square", "star", "above", "below"]
_SIZES: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 8,
    "vision_width": 16,
    "vision_depth": 2,
    "vision_heads": 2,
    "vision_mlp": 32,
}
_TEXT: dict[str, Any] = {
    "text_width": 16,
    "text_depth": 2,
    "text_heads": 2,
    "text_mlp": 32,
    "max_positions": 16,
    "dropout": 0.0,
}


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "vocab.txt").write_text("\n".join(_WORDS))
    (tmp_path / "texts.txt").write_text("a red circle\na blue square\n")
    model = BlipCaption(CaptionConfig(**_SIZES, **_TEXT, vocab_size=len(_WORDS) + 2)).eval()
    upop.shrink(model, {"visual_encoder.blocks.0.mlp": range(20)})
    upop.save(model, tmp_path / "dense")
    return tmp_path


def convert(folders: Path, *more: str) -> Any:
    asked = ["convert", str(folders / "dense"), str(folders / "small"), "--vocabulary", str(folders / "texts.txt")]
    return CliRunner().invoke(app, [*asked, "--tokenizer", str(folders / "words"), *more], env={"COLUMNS": "300"})


def test_a_cut_blip_keeps_the_words_of_its_texts(folders: Path) -> None:
    done = convert(folders)
    assert done.exit_code == 0, done.output
    assert "of 16 words stay" in done.output
    dense, small = (cast("Any", upop.load(folders / name)) for name in ("dense", "small"))
    before, after = load_tokenizer(folders / "words"), load_tokenizer(folders / "small")
    assert len(after) == small.config.vocab_size < len(before)
    images, mask = torch.randn(1, 3, 16, 16), torch.ones(1, 5, dtype=torch.long)
    ids = [torch.tensor([each("a red circle")["input_ids"]]) for each in (before, after)]
    assert after.convert_ids_to_tokens(ids[1][0]) == before.convert_ids_to_tokens(ids[0][0])
    kept = torch.tensor(small.upop_vocabulary)
    with torch.no_grad():
        torch.testing.assert_close(small(images, ids[1], mask), dense(images, ids[0], mask)[..., kept])
        end = after.sep_token_id
        made = small.generate(images, (), end, max_length=6, min_length=1)
    assert int(made.max()) < len(after)


def test_another_form_is_refused(folders: Path) -> None:
    refused = convert(folders, "--to", "official")
    assert isinstance(refused.exception, SettingError)
    assert "Leave --to out" in str(refused.exception)
    assert not (folders / "small").exists()
