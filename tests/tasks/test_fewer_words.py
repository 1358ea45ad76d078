"""The setting `vocabulary`: words that a task never uses go before a compression, and targets count them as reached."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

import chat_models
import runs
import tiny_dual
import upop
from upop.cli.app import app, main
from upop.data.tokenizer import load_tokenizer
from upop.errors import SettingError
from upop.pruning import count_parameters
from upop.runs.verbs import compress
from upop.settings import read_settings
from upop.tasks import find_task
from upop.tasks.chat import chat_format

SHARE = 0.6


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    chat_format.cache_clear()


def run(task: str, settings: Any) -> dict[str, Any]:
    """Compress; return the rows of the results by name, with the plan's counts as reached."""
    results = compress(find_task(task), settings)
    assert results is not None
    dense, small = results.models
    plan = json.loads((settings.output_dir / "plan.json").read_text())
    return {"dense": dense, "small": small, "reached": plan["settings"]["reached"]["params"]}


def check(found: dict[str, Any], whole: int, share: float = SHARE) -> None:
    """Check that shares, tables and names speak of the model with all its words."""
    dense, small, reached = found["dense"].parameters, found["small"].parameters, found["reached"]
    assert dense == reached["dense"] == whole
    assert small == reached["left"]
    assert share * whole - 0.01 * whole <= small <= share * whole
    assert found["small"].name.endswith(f" {whole / small:.3g}x")


@pytest.mark.slow
def test_a_blip_loses_words_and_keeps_to_the_target_of_the_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    config = runs.make_task("nlvr", tmp_path, epochs=1)
    (tmp_path / "texts.txt").write_text("a red circle above a blue square\n")
    quick = {"method": "one-shot", "examples": 0, "target": f"params={SHARE}", "vocabulary": tmp_path / "texts.txt"}
    settings = read_settings(find_task("nlvr").settings, config, {**quick, "output_dir": tmp_path / "out"})
    dense = upop.load(str(settings.pretrained))
    found = run("nlvr", settings)
    check(found, count_parameters(dense))
    (cut,) = [line for line in caplog.messages if line.startswith("cut; ")]  # it says both, whatever was asked for
    assert f"{found['small'].parameters:,} of {count_parameters(dense):,} parameters" in cut
    assert f"{1e9 * found['small'].gmacs:,.0f} of {1e9 * found['dense'].gmacs:,.0f} multiply-adds" in cut
    small, words = upop.load(tmp_path / "out" / "best"), load_tokenizer(tmp_path / "out" / "best")
    assert small.config.vocab_size == len(words) < dense.config.vocab_size  # type: ignore[union-attr]
    assert "[UNK]" not in words.tokenize("a red circle") and "[UNK]" in words.tokenize("yellow")
    kept = read_settings(find_task("nlvr").settings, tmp_path / "out" / "settings.yaml", {})
    assert (kept.pretrained, kept.vocabulary) == (settings.pretrained, settings.vocabulary)  # the run, as it was asked


def test_a_clip_loses_words(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    model, pairs = tiny_dual.save_dual("clip", tmp_path / "clip"), tiny_dual.write_pairs(tmp_path / "pairs")
    (tmp_path / "ids.json").write_text("[5, 6, 7]")
    given: dict[str, Any] = {"pretrained": str(model), "data": str(pairs), "vocabulary": tmp_path / "ids.json"}
    quick = {"num_workers": 0, "batch_size_train": 8, "epochs": 1, "device": "cpu", "method": "one-shot", "examples": 0}
    settings = find_task("dual-encoder").settings(
        target=f"params={SHARE}", output_dir=tmp_path / "out", **{**given, **quick}
    )
    found = run("dual-encoder", settings)
    (said,) = [line for line in caplog.messages if line.startswith("vocabulary: ")]
    assert "training samples" in said and "ids.json" in said  # their words are not among the three
    check(found, count_parameters(upop.load(model)))
    read = transformers.AutoProcessor.from_pretrained(tmp_path / "out" / "best")
    before = transformers.AutoProcessor.from_pretrained(model)
    small: Any = upop.load(tmp_path / "out" / "best")
    assert len(read.tokenizer) == small.config.text_config.vocab_size < len(before.tokenizer)
    row = json.loads(pairs.read_text().splitlines()[0])["caption"][0]
    texts = [each.tokenizer(row)["input_ids"] for each in (before, read)]  # words of the first sample are kept
    assert texts[1] != texts[0]
    assert read.tokenizer.convert_ids_to_tokens(texts[1]) == before.tokenizer.convert_ids_to_tokens(texts[0])


def test_a_chat_model_loses_words_without_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = chat_models.llama(tmp_path / "model")
    rows = [{"question": "What colour is this ?", "answer": each} for each in ("red", "green", "blue") * 3]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "texts.txt").write_text("What colour is this ?\nred\ngreen\nblue\n")
    said = ["upop", "prune", str(model), "--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "small")]
    said += ["--vocabulary", str(tmp_path / "texts.txt"), "--target", f"params={SHARE}", "--samples", "4"]
    monkeypatch.setattr("sys.argv", [*said, "--device", "cpu", "--set", "max_new_tokens=2"])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and "words stay" in shown
    dense, small = count_parameters(upop.load(model)), upop.load(tmp_path / "small")
    assert SHARE * dense * 0.97 <= count_parameters(small) <= SHARE * dense
    assert f"one-shot {dense / count_parameters(small):.3g}x" in shown
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "small")
    assert len(words) == small.config.vocab_size  # type: ignore[union-attr]
    asked = [{"role": "user", "content": "What colour is this ?"}]
    before = transformers.AutoTokenizer.from_pretrained(model)
    ids = [each.apply_chat_template(asked, return_dict=True)["input_ids"] for each in (before, words)]
    assert before.convert_ids_to_tokens(ids[0]) == words.convert_ids_to_tokens(ids[1])  # so is the template


def test_a_target_counts_words_that_went_in_python() -> None:
    torch.manual_seed(0)
    model = tiny_dual.clip_model()
    whole = count_parameters(model)
    upop.reduce_vocabulary(model, range(10))
    gone = whole - count_parameters(model)
    assert gone > 0
    pruner = upop.Pruner(model, steps=1, target={"params": SHARE})
    assert pruner.plan().settings["reached"]["params"]["dense"] == whole
    with pytest.raises(SettingError, match=rf"of {whole:,}"):
        upop.Pruner(model, steps=1, target={"params": 0.01})
    pruner.remove()
    with pytest.raises(SettingError, match=rf"{whole - gone:,} of {whole:,} parameters"):  # it went with the words
        upop.Pruner(model, steps=1, target={"params": 0.99})


@pytest.mark.parametrize("content", ["", " \n\n", "[]"])
def test_a_file_without_words_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "texts.txt").write_text(content)
    small = transformers.BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = transformers.BertModel(small)
    with pytest.raises(SettingError, match=r"texts\.txt is empty"):
        upop.reduce_vocabulary(model, tmp_path / "texts.txt")


def test_a_dry_run_reads_the_file(tmp_path: Path) -> None:
    config = runs.make_task("caption", tmp_path)
    asked = ["compress", "caption", "--config", str(config), "--dry-run", "--vocabulary"]
    shown = CliRunner().invoke(app, [*asked, str(tmp_path / "none.txt")]).output
    assert "missing" in shown and "not usable yet" in shown and "readable" not in shown.replace("\n", " ")
    (tmp_path / "texts.txt").write_text("a red circle\n")
    assert "not usable" not in CliRunner().invoke(app, [*asked, str(tmp_path / "texts.txt")]).output


@pytest.mark.slow
def test_a_task_without_words_refuses_it(tmp_path: Path) -> None:
    config = runs.make_task("classification", tmp_path)
    (tmp_path / "texts.txt").write_text("a red circle\n")
    more = {"vocabulary": tmp_path / "texts.txt", "output_dir": tmp_path / "out"}
    with pytest.raises(SettingError, match="classification has no text"):
        compress(find_task("classification"), read_settings(find_task("classification").settings, config, more))
