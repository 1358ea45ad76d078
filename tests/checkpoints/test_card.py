"""The model card: what it says of each kind of model, and that it is one that the hub reads."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from torch import nn
from transformers import BertConfig, BertModel

import upop
from upop.checkpoints.saving.card import Story, write_card
from upop.errors import CheckpointError

STORY = Story(
    name="UPop 2x",
    task="caption",
    pipeline="image-to-text",
    base="Salesforce/blip-image-captioning-base",
    facts={"data (ann_root)": "annotation", "seed": "42"},
    metrics=["bleu4"],
    columns=["test bleu4 (%)", "parameters (M)"],
    rows=[("dense", ["38.1", "224.0"]), ("UPop 2x", ["37.5 (-0.6)", "127.1 (1.76x smaller)"])],
    note="Latency: not measured.",
    command="upop compress caption --p 0.5",
)


def vit() -> nn.Module:
    model: nn.Module = timm.create_model("deit_tiny_patch16_224", depth=2, img_size=32)
    return model


def halved(model: nn.Module, **about: float) -> nn.Module:
    groups = upop.find_groups(model)
    return upop.shrink(model, upop.Plan.of(groups, {group.name: range(group.size // 2) for group in groups}, **about))


def code_of(text: str) -> str:
    """The lines that say how to load it."""
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1]


def test_a_timm_model_is_loaded_as_its_card_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = halved(vit(), ratio=0.5)
    upop.save(model, tmp_path / "small")
    card = ModelCard.load(tmp_path / "small" / "README.md")
    assert card.data.library_name == "upop"
    assert card.data.tags == ["upop", "pruning", "compression", "timm"]
    assert card.data.base_model is None
    assert "timm's `deit_tiny_patch16_224`" in card.text
    assert f"parameters: {upop.count_parameters(model):,}" in card.text
    assert "removed: 0.5" in card.text
    assert "| vision | 50.0 % | 50.0 % | 50.0 % |" in card.text
    names: dict[str, nn.Module] = {}
    monkeypatch.chdir(tmp_path)
    exec(code_of(card.text).replace("path/to/this/folder", "small"), names)
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(names["model"](image), model.eval()(image))


def test_a_transformers_model_is_loaded_by_transformers_as_its_card_says(tmp_path: Path) -> None:
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=40)
    config.name_or_path = "someone/bert-small"
    model = halved(BertModel(config))
    upop.save(model, tmp_path / "small")
    card = ModelCard.load(tmp_path / "small" / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.base_model == "someone/bert-small"
    assert "made from `someone/bert-small`" in card.text
    names: dict[str, nn.Module] = {}
    exec(code_of(card.text).replace("path/to/this/folder", str(tmp_path / "small")), names)
    words = torch.ones(1, 4, dtype=torch.long)
    with torch.no_grad():
        expected = model.eval()(words).last_hidden_state
        assert torch.equal(names["model"].eval()(words).last_hidden_state, expected)
    # transformers writes beside a card, and leaves it alone.
    model.save_pretrained(tmp_path / "small")  # type: ignore[operator]
    assert ModelCard.load(tmp_path / "small" / "README.md").data.base_model == "someone/bert-small"


def test_any_other_model_is_loaded_into_its_dense_form(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.body(x)
            return found

    upop.save(halved(Net()), tmp_path / "small")
    text = (tmp_path / "small" / "README.md").read_text()
    assert 'upop.load_into(dense_model, "path/to/this/folder")' in text


def test_a_dense_model_gets_no_card(tmp_path: Path) -> None:
    upop.save(vit(), tmp_path / "dense")
    assert not (tmp_path / "dense" / "README.md").exists()


def test_a_run_tells_where_the_model_comes_from_and_what_was_measured(tmp_path: Path) -> None:
    upop.save(halved(vit(), ratio=0.5, steps=1200, interval=50), tmp_path / "small")
    write_card(tmp_path / "small", STORY)
    card = ModelCard.load(tmp_path / "small" / "README.md")
    assert card.data.base_model == STORY.base
    assert card.data.pipeline_tag == "image-to-text"
    assert card.data.metrics == ["bleu4"]
    for line in (
        "# UPop 2x, caption",
        "| model | test bleu4 (%) | parameters (M) |",
        "| UPop 2x | 37.5 (-0.6) | 127.1 (1.76x smaller) |",
        "- dense model: `Salesforce/blip-image-captioning-base`",
        "- search steps: 1,200",
        "- data (ann_root): `annotation`",
        "upop compress caption --p 0.5",
        "Latency: not measured.",
    ):
        assert line in card.text.splitlines()
    assert "with unified and progressive pruning" in card.text


def test_a_path_on_this_machine_is_no_model_of_the_hub(tmp_path: Path) -> None:
    upop.save(halved(vit()), tmp_path / "small")
    write_card(tmp_path / "small", Story(**{**vars(STORY), "base": "pretrained/model.pth", "pipeline": None}))
    card = ModelCard.load(tmp_path / "small" / "README.md")
    assert card.data.base_model is None
    assert card.data.pipeline_tag is None
    assert "`pretrained/model.pth`" in card.text


def test_texts_of_users_break_nothing(tmp_path: Path) -> None:
    odd = "a|b `c` <script>\n# heading"
    upop.save(halved(vit()), tmp_path / "small")
    rows = [(odd, ["1.0", "2"])]
    write_card(tmp_path / "small", Story(**{**vars(STORY), "base": odd, "facts": {"data": odd}, "rows": rows}))
    text = ModelCard.load(tmp_path / "small" / "README.md").text
    assert "# heading" not in text.splitlines()
    assert "| a\\|b \\`c\\` &lt;script&gt; # heading | 1.0 | 2 |" in text
    assert "- data: `` a|b `c` <script> # heading ``" in text


def test_a_card_needs_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"upop\.json cannot be read"):
        write_card(tmp_path, STORY)
    (tmp_path / "upop.json").write_text(json.dumps({"class": "a.B"}))
    with pytest.raises(CheckpointError, match=r"upop\.json cannot be read"):
        write_card(tmp_path, STORY)


@pytest.mark.parametrize(
    "odd",
    [
        "[a](http://a) ![b](http://b) <img src=x> **c** ~~d~~ $e$",
        "a ```` b\n```\n# heading\n<b>",
        "\x1b[31mred\x1b[0m \u202ereversed \u2066 \udcff",
        "---\nlibrary_name: other\n---",
    ],
)
def test_what_texts_of_users_mean_elsewhere_they_do_not_mean_in_a_card(tmp_path: Path, odd: str) -> None:
    upop.save(halved(vit()), tmp_path / "small")
    rows = [(odd, [odd, "2"])]
    changes = {"name": odd, "base": odd, "facts": {"data": odd}, "rows": rows, "columns": [odd, "b"], "note": odd}
    write_card(tmp_path / "small", Story(**{**vars(STORY), **changes, "command": odd}))
    card = ModelCard.load(tmp_path / "small" / "README.md")
    assert card.data.library_name == "upop"
    shown = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(card.text)
    assert "href" not in shown and "<img" not in shown and "<b>" not in shown and "<del>" not in shown
    assert "<strong>" not in shown
    assert shown.count("<h1>") == 1
    assert not set("\x1b\u202e\u2066\udcff") & set(card.text)
