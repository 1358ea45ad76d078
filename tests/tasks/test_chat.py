"""`upop compress chat` and its kin: whole runs on tiny models, and what is said of wrong inputs."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

import chat_models
import upop
from upop.checkpoints import open_checkpoint
from upop.cli import main
from upop.errors import DataError, MissingLibraryError, SettingError, UPopError
from upop.examples import Examples
from upop.metrics.answers import anls, answer_scores
from upop.runs.loop import Loop
from upop.runs.one_shot import towers
from upop.runs.verbs import compress, evaluate_checkpoint
from upop.tasks import find_task
from upop.tasks.chat import ChatSettings, chat_format
from upop.tasks.estimate import check_memory, estimate
from upop.tasks.prune import prune, task_for

COLOURS = ("red", "green", "blue")


@pytest.fixture(autouse=True)
def forget_processors() -> None:
    chat_format.cache_clear()


def rows(folder: Path, *, images: bool, count: int = 12) -> Path:
    folder.mkdir(exist_ok=True)
    described = []
    for number in range(count):
        colour = COLOURS[number % 3]
        row = {"question": "What colour is this?" if images else f"It is {colour} ?", "answer": colour}
        if images:
            Image.new("RGB", (32, 32), colour).save(folder / f"{number}.png")
            row["image"] = f"{number}.png"
        described.append(row)
    file = folder / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in described))
    return file


def settings(model: Path, data: Path, out: Path, **more: Any) -> ChatSettings:
    quick = {"num_workers": 0, "batch_size_train": 4, "max_new_tokens": 3, "device": "cpu", "ratio": 0.3}
    return ChatSettings(pretrained=str(model), data=str(data), output_dir=out, **{**quick, "epochs": 2, **more})


def test_compress_load_and_evaluate(tmp_path: Path) -> None:
    model, data = chat_models.smolvlm(tmp_path / "model"), rows(tmp_path / "data", images=True)
    results = compress(find_task("chat"), settings(model, data, tmp_path / "out"))
    assert results is not None
    dense, small = results.models
    assert small.parameters < dense.parameters
    assert {"token_acc", "perplexity", "exact_match", "anls"} <= small.metrics["val"].keys()
    shown = Examples.read(tmp_path / "out" / "examples").samples[0]
    assert shown.images and shown.prompt == "What colour is this?" and shown.truth is not None
    assert set(shown.answers) == {"dense", small.name}
    best = tmp_path / "out" / "best"
    given = settings(best, data, tmp_path / "again")
    one = find_task("chat").load(best, given)
    other = transformers.AutoModelForImageTextToText.from_pretrained(best)
    batch = find_task("chat").example(one, 1)
    written = [each.eval().generate(**batch, max_new_tokens=4, do_sample=False) for each in (one, other)]
    assert torch.equal(*written)
    again = evaluate_checkpoint(find_task("chat"), given.as_evaluated())
    assert again is not None and "test" in again.models[0].metrics


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"data": "rows.json"}, "did you mean 'rows.jsonl'"),
    ({"data": None}, "No rows to train on are given"),
    ({"pretrained": None}, "No model is given"),
    ({"columns": {"answer": "reply"}}, "has no column 'reply'"),
    ({"pretrained": "data"}, "no processor that transformers can read"),
]


@pytest.mark.parametrize(("changed", "said"), WRONG, ids=[said for _, said in WRONG])
def test_wrong_inputs_are_answered(
    changed: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows(Path("data"), images=False)
    given = {
        "pretrained": str(chat_models.llama(tmp_path / "model")),
        "data": "data/rows.jsonl",
        "output_dir": Path("out"),
    }
    changed = {name: f"data/{value}" if name == "data" and value else value for name, value in changed.items()}
    with pytest.raises(UPopError, match=said):
        compress(find_task("chat"), ChatSettings(num_workers=0, device="cpu", **{**given, **changed}))
    assert not Path("out").exists() or not list(Path("out").glob("*.json*"))


def test_an_optimizer_that_is_not_installed_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upop.runs.evaluation.evaluate", pytest.fail)
    model, data = chat_models.llama(tmp_path / "model"), rows(tmp_path / "data", images=False)
    asked = settings(model, data, tmp_path / "out", optimizer="paged_adamw8bit")
    with pytest.raises(SettingError, match="paged_adamw8bit needs a CUDA device, and the run has none"):
        compress(find_task("chat"), asked)
    task, on_gpu, layer = find_task("chat"), asked.model_copy(update={"device": "cuda"}), torch.nn.Linear(2, 2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        MissingLibraryError, match=r"bitsandbytes, which is not installed. Run: pip install 'upop\[chat\]'"
    ):
        task.adapt(layer, on_gpu, training=True)
    stands_in = SimpleNamespace(AdamW8bit=torch.optim.SGD, PagedAdamW8bit=torch.optim.RAdam)
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=stands_in))
    assert type(task.optimizer(layer, on_gpu)) is torch.optim.RAdam


def test_logits_alone_teach_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def made(_: Any, **options: Any) -> None:
        given.update(options)
        raise SettingError("this is enough")

    monkeypatch.setattr("upop.runs.verbs.Compression", made)
    model, data = chat_models.llama(tmp_path / "model"), rows(tmp_path / "data", images=False)
    for weights, taught in (({"distill_logits": 1.0}, True), ({}, False)):
        with pytest.raises(SettingError, match="enough"):
            compress(find_task("chat"), settings(model, data, tmp_path / f"{taught}", distill=0.0, **weights))
        assert isinstance(given["teacher"], torch.nn.Module) is taught


def test_flags_name_model_data_and_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[ChatSettings] = []
    monkeypatch.setattr("upop.runs.verbs.evaluate_checkpoint", lambda _, settings: taken.append(settings))
    flags = ["--model", "m", "--data", "d.jsonl", "--column", "answer=reply", "--rows", "5", "--image-root", "i"]
    monkeypatch.setattr("sys.argv", ["upop", "evaluate", "chat", *flags])
    with pytest.raises(SystemExit):
        main()
    (found,) = taken
    assert (found.pretrained, found.test_data, found.data) == ("m", "d.jsonl", None)
    assert (found.columns, found.rows, found.image_root) == ({"answer": "reply"}, 5, Path("i"))


def test_scores_of_answers() -> None:
    assert anls("Mount Fuji", ["mount fuji"]) == 1 and anls("Mount Fuji", ["mont fuji"]) == pytest.approx(0.9)
    assert anls("red", ["green"]) == 0 and anls("", [""]) == 1
    people = [["two"] * 3 + ["three"] * 7, ["a cat", "dog"]]
    assert answer_scores(["2", "cat."], people)["exact_match"] == 100
    assert answer_scores(["2", "bird"], people)["vqa_acc"] == pytest.approx(100 * (0.3 * 2 / 3 + 0.7 * 1.0) / 2)
    assert "vqa_acc" not in answer_scores(["2"], [["2"]])


def test_streaming_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="number of rows"):
        ChatSettings(data="owner/set", streaming=True)


def test_answers_beyond_what_is_read_are_told(tmp_path: Path) -> None:
    model, data = chat_models.llama(tmp_path / "model"), rows(tmp_path / "data", images=False)
    short = settings(model, data, tmp_path / "none", max_tokens=8).as_evaluated()
    with pytest.raises(DataError, match=r"line 1: the answer lies beyond max_tokens \(8\).*all other evaluated rows"):
        evaluate_checkpoint(find_task("chat"), short)
    with data.open("a") as file:
        file.write(json.dumps({"question": "What is it ? " * 200, "answer": "red"}) + "\n")
    some = settings(model, data, tmp_path / "some", max_tokens=100).as_evaluated()
    with pytest.warns(UserWarning, match=r"1 of 13 rows \(.*line 13\) have their answers beyond max_tokens"):
        found = evaluate_checkpoint(find_task("chat"), some)
    assert found is not None and found.models[0].metrics["test"]["perplexity"] > 1


def test_prune_without_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = chat_models.llama(tmp_path / "model"), rows(tmp_path / "data", images=False)
    command = ["upop", "prune", str(model), "--data", str(data), "--ratio", "0.4", "--out", str(tmp_path / "small")]
    monkeypatch.setattr("sys.argv", [*command, "--samples", "8", "--device", "cpu", "--set", "max_new_tokens=3"])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and "one-shot" in shown and "perplexity" in shown
    small = upop.load(tmp_path / "small")
    assert upop.count_parameters(small) < upop.count_parameters(upop.load(model))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "small").chat_template == chat_models.TURN
    card = (tmp_path / "small" / "README.md").read_text()
    assert "one-shot" in card and 'pipeline_tag: "text-generation"' in card
    monkeypatch.setattr("upop.tasks.prune.evaluate", lambda *_: pytest.fail("it is evaluated"))
    monkeypatch.setattr("sys.argv", [*command[:-1], str(tmp_path / "none"), "--include", "*.nothing"])
    with pytest.raises(SystemExit):
        main()
    assert "matches none of the" in "".join(capsys.readouterr())
    beyond = [word for word in command[:-1] if word not in ("--ratio", "0.4")]
    monkeypatch.setattr("sys.argv", [*beyond, str(tmp_path / "none"), "--target", "params=0.001"])
    with pytest.raises(SystemExit):
        main()
    assert "target params=0.001 cannot be reached" in "".join(capsys.readouterr())
    monkeypatch.setattr("sys.argv", [*command[:-1], str(tmp_path / "none"), "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0 and "recovery by LoRA" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("verb", "says"), [("train", "train for 3 epochs"), ("compress", "by first-order importance")])
def test_a_dry_run_says_what_it_takes_of_memory(
    verb: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = chat_models.llama(tmp_path / "model"), rows(tmp_path / "data", images=False)
    words = [verb, "chat", "--model", str(model), "--data", str(data), "--output-dir", str(tmp_path / "out")]
    more = ["--dry-run", "--epochs", "3", *(["--method", "one-shot"] if verb == "compress" else [])]
    monkeypatch.setattr("sys.argv", ["upop", *words, *more])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and says in shown and "The data are readable. Memory:" in shown
    assert "recovery of all weights" in shown and not (tmp_path / "out").exists()
    assert "are Python, libraries and data" in shown and "Free now:" in shown


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = chat_models.llama(tmp_path / "model"), rows(tmp_path / "data", images=False)
    given = ["--data", str(data), "--device", "cpu"]
    monkeypatch.setattr("upop.tasks.chat.ChatTask.load", lambda *_: pytest.fail("it is read"))
    free = {"bytes": 1000}
    monkeypatch.setattr("upop.tasks.estimate.free_bytes", lambda _device: free["bytes"])
    for words in (["prune", str(model), "--out"], ["compress", "chat", "--model", str(model), "--output-dir"]):
        monkeypatch.setattr("sys.argv", ["upop", *words, str(tmp_path / "none"), *given])
        with pytest.raises(SystemExit):
            main()
        assert "needs at least" in (shown := "".join(capsys.readouterr())) and "are free on cpu" in shown
        assert not (tmp_path / "none").exists()
    # The numbers of a proof and the weights are what is sure; with more than these, the run is only warned of.
    found = estimate(find_task("chat"), settings(model, data, tmp_path / "none"))
    free["bytes"] = found.least(trained=False)
    notes: list[str] = []
    check_memory(find_task("chat"), settings(model, data, tmp_path / "none"), trained=False, notify=notes.append)
    assert len(notes) == 1 and "is estimated to need" in notes[0]
    free["bytes"] = found.one_shot()
    check_memory(find_task("chat"), settings(model, data, tmp_path / "none"), trained=False, notify=notes.append)
    assert len(notes) == 1


def test_what_the_estimate_counts(tmp_path: Path) -> None:
    """A copy in float64 where the model is small, for the groups on a CPU alone; the teacher with a training."""
    model, data = chat_models.llama(tmp_path / "model"), rows(tmp_path / "data", images=False)
    found = estimate(find_task("chat"), settings(model, data, tmp_path / "none"))
    assert found.reading == 16 * found.parameters and found.proof > 8 * found.parameters
    large = dataclasses.replace(found, parameters=7_000_000_000, device=torch.device("cuda"))
    assert large.proof < large.weights and large.reading < 6 * 2**30
    assert large.one_shot() < 1.3 * large.weights and large.one_shot() > large.weights
    alone = dataclasses.replace(large, teacher=False)
    assert large.recovery(adapters=True) - alone.recovery(adapters=True) == large.weights


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(chat_models.FAMILIES))
def test_every_family_is_pruned_saved_loaded_and_writes_the_same(family: str, tmp_path: Path) -> None:
    model = chat_models.FAMILIES[family](tmp_path / "model")
    data = rows(tmp_path / "data", images=family != "llama")
    task = task_for(open_checkpoint(model))
    assert task.name == "chat"
    results = prune(task, settings(model, data, tmp_path / "small", samples=8))
    dense, pruned = results.models
    assert pruned.parameters < dense.parameters
    one: Any = task.load(tmp_path / "small", settings(tmp_path / "small", data, tmp_path / "out"))
    kind = getattr(transformers, type(one).__mro__[0].__name__)
    other = kind.from_pretrained(tmp_path / "small").eval()
    batch = task.example(one, 1)
    asked = {name: value for name, value in batch.items() if name != "decoder_input_ids"}
    written = [each.generate(**asked, max_new_tokens=4, do_sample=False) for each in (one, other)]
    assert torch.equal(*written)
    again = compress(task, settings(tmp_path / "model", data, tmp_path / "out", batch_size_train=4))
    assert again is not None and again.models[1].parameters < again.models[0].parameters


def test_towers_are_included_by_name(tmp_path: Path) -> None:
    model = upop.load(chat_models.smolvlm(tmp_path / "model"))
    modalities = {name: group.modality for group in upop.find_groups(model) for name in [group.name]}
    for tower, modality in (("vision", "vision"), ("text", "text")):
        found = towers(model, [tower])
        assert found and {modalities[name] for name in found} == {modality}
    assert towers(model, []) is None
    with pytest.raises(SettingError, match="Its groups belong to text"):
        towers(upop.load(chat_models.llama(tmp_path / "words")), ["vision"])


def test_recovery_by_adapters_is_merged_and_resumed(tmp_path: Path) -> None:
    model, data = chat_models.llama(tmp_path / "model"), rows(tmp_path / "data", images=False)
    described = {"method": "one-shot", "lora": 2, "samples": 8, "epochs": 2, "examples": 0, "init_lr": 1e-2}
    whole = compress(find_task("chat"), settings(model, data, tmp_path / "whole", **described))
    assert whole is not None
    best = upop.load(tmp_path / "whole" / "best")
    assert not any("lora" in name for name in best.state_dict())
    last = upop.load(tmp_path / "whole" / "last")
    shapes = {name: value.shape for name, value in best.state_dict().items()}
    assert shapes == {name: value.shape for name, value in last.state_dict().items()}
    assert upop.count_parameters(best) == whole.models[1].parameters < whole.models[0].parameters

    def stopped(self: Any, model: Any, *args: Any, **more: Any) -> None:
        evaluated(self, model, *args, **more)
        raise KeyboardInterrupt

    evaluated = Loop._evaluate
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Loop, "_evaluate", stopped)
        compress(find_task("chat"), settings(model, data, tmp_path / "parts", **described))
    resumed = compress(find_task("chat"), settings(model, data, tmp_path / "parts", **described, resume="must"))
    assert resumed is not None and resumed.models[1].metrics == whole.models[1].metrics
    again = upop.load(tmp_path / "parts" / "best").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in best.state_dict().items())
