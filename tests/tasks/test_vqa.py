"""The VQA task: whole runs, both ways to answer, what is written for the server, and the published settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import runs
import upop
from together import run_script
from upop.checkpoints.official import save_official
from upop.cli.published import blip_command
from upop.data.answers import answer_type
from upop.errors import CheckpointError, DataError, SettingError
from upop.metrics.vqa import answer_accuracy
from upop.models.vqa import BlipVqa, VqaConfig, answer_losses
from upop.runs.loaders import first_samples, make_loader
from upop.runs.verbs import compress, evaluate_checkpoint, train
from upop.settings import read_settings
from upop.tasks import find_task
from upop.tasks.vqa import VqaSettings

ROOT = Path(__file__).parents[2]
TASK = find_task("vqa")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 questions to train on and 16 of Visual Genome, a dense model with random weights, the settings for both."""
    folder = tmp_path_factory.mktemp("vqa")
    return runs.make_task("vqa", folder)


def settings_of(config: Path, **overrides: Any) -> VqaSettings:
    return read_settings(VqaSettings, config, overrides)


@pytest.fixture(scope="module")
def compressed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "2x"
    compress(TASK, settings_of(config, output_dir=folder))
    return folder


def samples(settings: VqaSettings, name: str) -> list[dict[str, Any]]:
    return json.loads((settings.ann_root / f"{name}.json").read_text())


def test_run_folder_and_results(config: Path, compressed: Path, tmp_path: Path) -> None:
    dense, small = json.loads((compressed / "results.json").read_text())["models"]
    kinds = {"accuracy", "accuracy_yes_no", "accuracy_number", "accuracy_other"}
    assert set(small["metrics"]["val"]) == kinds
    assert small["metrics"]["test"] == {}  # whose answers nobody has
    model = upop.load(compressed / "best")
    assert small["parameters"] == upop.count_parameters(model) < dense["parameters"]
    assert small["gmacs"] < dense["gmacs"]
    assert small["published_gmacs"] < dense["published_gmacs"]
    searched = [json.loads(row) for row in (compressed / "metrics.jsonl").read_text().splitlines()]
    assert max(row.get("ratio", 0) for row in searched if row["phase"] == "search") == 0.5
    again = evaluate_checkpoint(
        TASK, settings_of(config, pretrained=str(compressed / "best"), output_dir=tmp_path, batch_size_test=7)
    )
    assert again is not None
    assert dict(again.models[0].metrics) == small["metrics"]
    for name in ("vqa_result.json", "vqa_result_val.json"):
        assert (tmp_path / "result" / name).read_text() == (compressed / "result" / name).read_text()


def test_the_file_for_the_server_has_one_answer_per_question(config: Path, compressed: Path) -> None:
    settings = settings_of(config)
    listed = json.loads(settings.answer_list.read_text())
    rows = json.loads((compressed / "result" / "vqa_result.json").read_text())
    assert [row["question_id"] for row in rows] == [sample["question_id"] for sample in samples(settings, "vqa_test")]
    assert all(set(row) == {"question_id", "answer"} for row in rows)
    assert all(type(row["question_id"]) is int and row["answer"] in listed for row in rows)


def test_accuracies_are_those_of_the_answers_that_were_written(config: Path, compressed: Path) -> None:
    """Read anew from the files, question by question."""
    asked = {sample["question_id"]: sample["answer"] for sample in samples(settings_of(config), "vqa_val")}
    rows = json.loads((compressed / "result" / "vqa_result_val.json").read_text())
    found = json.loads((compressed / "results.json").read_text())["models"][1]["metrics"]["val"]
    every = {row["question_id"]: answer_accuracy(row["answer"], asked[row["question_id"]]) for row in rows}
    assert len(every) == len(asked)
    assert found["accuracy"] == pytest.approx(100 * sum(every.values()) / len(every))
    for kind in ("yes/no", "number", "other"):
        those = [value for number, value in every.items() if answer_type(asked[number]) == kind]
        assert found[f"accuracy_{kind.replace('/', '_')}"] == pytest.approx(100 * sum(those) / len(those))


def test_answers_may_be_written_instead_of_ranked(config: Path, compressed: Path, tmp_path: Path) -> None:
    """Without a list of candidates, and alike in batches of any size."""
    elsewhere = tmp_path / "annotation"
    elsewhere.mkdir()
    for file in settings_of(config).ann_root.glob("vqa_*.json"):
        (elsewhere / file.name).write_bytes(file.read_bytes())
    changes = {"inference": "generate", "ann_root": elsewhere, "pretrained": str(compressed / "best")}
    written = []
    for size in (48, 9):
        folder = tmp_path / str(size)
        results = evaluate_checkpoint(TASK, settings_of(config, output_dir=folder, batch_size_test=size, **changes))
        assert results is not None
        assert 0 <= results.models[0].metrics["val"]["accuracy"] <= 100
        written.append(json.loads((folder / "result" / "vqa_result.json").read_text()))
    assert written[0] == written[1]
    assert all(type(row["answer"]) is str and "[" not in row["answer"] for row in written[0])
    with pytest.raises(DataError, match=r"answer_list\.json does not exist. Ranking needs it"):
        evaluate_checkpoint(TASK, settings_of(config, output_dir=tmp_path, **{**changes, "inference": "rank"}))


def test_loss_is_the_weighted_sum_per_question(config: Path) -> None:
    settings = settings_of(config)
    model = TASK.load(Path(str(settings.pretrained)), settings).eval()
    loader = make_loader(TASK, settings, "train")
    batch = first_samples(loader, 80)  # both files
    assert batch["answer_counts"].max() > 1
    assert batch["weights"][-16:].tolist() == pytest.approx([0.2] * 16)
    with torch.no_grad():
        losses = answer_losses(model(**TASK.inputs(batch)), batch["answer_ids"], batch["answer_mask"])
        found = TASK.loss(model, batch, settings, 0.0)
    assert float(found) == pytest.approx(sum((batch["weights"] * losses).tolist()) / 80, rel=1e-5)


def test_training_without_held_out_questions_keeps_the_last_epoch(config: Path, tmp_path: Path) -> None:
    """More candidates asked for than there are, and one pair in memory at a time elsewhere, are no problem."""
    train(TASK, settings_of(config, output_dir=tmp_path, val_file=None, test_file=None))
    best, last = (upop.load(tmp_path / name).state_dict() for name in ("best", "last"))
    assert all(torch.equal(best[name], last[name]) for name in best)
    results = evaluate_checkpoint(
        TASK, settings_of(config, output_dir=tmp_path, test_file="vqa_val", val_file=None, k_test=10**6)
    )
    assert results is not None
    assert 0 <= results.models[0].metrics["test"]["accuracy"] <= 100
    with pytest.raises(SettingError, match="nothing to evaluate on"):
        evaluate_checkpoint(TASK, settings_of(config, output_dir=tmp_path, val_file=None, test_file=None))


@pytest.mark.slow
def test_mixed_precision_and_recomputed_activations(config: Path, tmp_path: Path) -> None:
    changes = {"amp": True, "vit_grad_ckpt": True, "vit_ckpt_layer": 1, "test_file": None}
    results = train(TASK, settings_of(config, output_dir=tmp_path, **changes))
    assert results is not None
    assert 0 <= results.models[0].metrics["val"]["accuracy"] <= 100
    assert all(value.isfinite().all() for value in upop.load(tmp_path / "best").state_dict().values())


# --- candidates that are not the answers


def with_candidates(config: Path, tmp_path: Path, candidates: list[str]) -> VqaSettings:
    settings = settings_of(config, ann_root=tmp_path)
    for file in settings_of(config).ann_root.glob("v*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings.answer_list.write_text(json.dumps(candidates))
    return settings


def test_a_list_that_misses_some_training_answers_says_how_many(config: Path, tmp_path: Path) -> None:
    settings = with_candidates(config, tmp_path, ["yes", "no"])
    weight: dict[str, float] = {}
    for sample in samples(settings, "vqa_train"):
        for answer in sample["answer"]:
            weight[answer] = weight.get(answer, 0) + 0.1
    for sample in samples(settings, "vg_qa"):
        weight[sample["answer"]] = weight.get(sample["answer"], 0) + 0.2
    share = 100 * (1 - (weight["yes"] + weight["no"]) / sum(weight.values()))
    said = rf"{len(weight) - 2} of the {len(weight)} different training answers \({share:.1f} % by weight\)"
    with pytest.warns(UserWarning, match=said):
        TASK.dataset(settings, "train")


def test_a_list_without_any_training_answer_is_refused(config: Path, tmp_path: Path) -> None:
    settings = with_candidates(config, tmp_path, ["giraffe", "blue giraffe"])
    with pytest.raises(DataError, match=r"None of the \d+ different training answers is in .*answer_list\.json"):
        train(TASK, settings.model_copy(update={"output_dir": tmp_path / "run"}))
    TASK.dataset(settings.model_copy(update={"inference": "generate"}), "train")  # which needs no list


# --- checkpoints


@pytest.mark.slow
def test_fine_tuning_starts_from_a_decoder_that_looked_at_images(config: Path, tmp_path: Path) -> None:
    """Pre-trained with a wider vision transformer: the projections of the images' states have no place here."""
    settings = settings_of(config)
    state = upop.load(str(settings.pretrained)).state_dict()
    for name in [name for name in state if "text_decoder" in name and "crossattention.self." in name]:
        if name.endswith(("key.weight", "value.weight")):
            state[name] = torch.zeros(len(state[name]), 24)
    torch.save({"model": {**state, "itm_head.weight": torch.zeros(2, 32)}}, tmp_path / "pretrained.pth")
    model, lacking = TASK.start(tmp_path / "pretrained.pth", settings)
    assert len(lacking) == 2 * runs.BLIP["text_depth"]
    assert all("text_decoder" in name and "crossattention.self" in name for name in lacking)
    assert torch.equal(model.state_dict()["visual_encoder.norm.weight"], state["visual_encoder.norm.weight"])


def test_a_checkpoint_of_another_task_is_refused(config: Path, tmp_path: Path) -> None:
    settings = settings_of(config)
    state = upop.load(str(settings.pretrained)).state_dict()
    kept = {name: value for name, value in state.items() if not name.startswith("text_decoder")}
    torch.save({"model": kept}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth lacks text_decoder"):
        TASK.load(tmp_path / "other.pth", settings)


# --- what is published


def test_published_settings_are_the_defaults() -> None:
    path = ROOT / "configs" / "vqa.yaml"
    given = yaml.safe_load(path.read_text())
    found, plain = read_settings(VqaSettings, path, {}), VqaSettings()
    own = {"pretrained"}
    assert {name: getattr(found, name) for name in given if name not in own} == {
        name: getattr(plain, name) for name in given if name not in own
    }
    assert (found.batch_size_train, found.batch_size_test, found.image_size, found.k_test) == (32, 64, 480, 128)
    assert (found.init_lr, found.min_lr, found.weight_decay, found.max_epoch) == (2e-5, 0, 0.05, 10)
    assert (found.interval, found.w_sp_attn, found.w_sp_mlp, found.seed) == (1000, 1.44e-2, 5e-4, 42)
    assert found.train_files == ("vqa_train", "vqa_val", "vg_qa")
    assert (found.inference, TASK.evaluated(found)) == ("rank", ("test",))
    assert VqaConfig.vit("base").drop_path == 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inference": "ranking"}, r"inference: .*'rank' or 'generate'.*found 'ranking'"),
        ({"k_test": 0}, "k_test: .*found 0"),
        ({"rank_chunk": 0}, "rank_chunk: .*found 0"),
        ({"train_files": []}, "train_files: "),
        ({"k_tests": 8}, r"unknown key 'k_tests' \(did you mean 'k_test'\?\)"),
        ({"vqa_roots": "x"}, r"unknown key 'vqa_roots' \(did you mean 'vqa_root'\?\)"),
    ],
    ids=str,
)
def test_mistakes_in_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        read_settings(VqaSettings, ROOT / "configs" / "vqa.yaml", changes)


@pytest.mark.slow
def test_published_pair_of_commands(config: Path, tmp_path: Path) -> None:
    command = blip_command("vqa", "./configs/vqa.yaml")
    flags = ["--config", str(config), "--device", "cpu", "--seed", "42", "--set", "val_file=null"]
    asked = [*flags, "--p", "0.5", "--epoch", "1", "--w_sp_attn", "1.44e-2", "--w_sp_mlp", "5e-4"]
    done = CliRunner().invoke(command, [*asked, "--output_dir", str(tmp_path / "2x")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    model = upop.load(tmp_path / "2x" / "best")
    assert isinstance(model, BlipVqa)
    save_official("vqa", model, tmp_path / "compressed.pth")
    asked = [*flags, "--evaluate", "--pretrained", str(tmp_path / "compressed.pth")]
    done = CliRunner().invoke(command, [*asked, "--output_dir", str(tmp_path / "e")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "compressed.pth" in done.output
    first, second = (json.loads((tmp_path / name / "result" / "vqa_result.json").read_text()) for name in ("2x", "e"))
    assert first == second


@pytest.mark.slow
def test_the_published_script_over_two_processes_gives_the_same_answers(
    config: Path, compressed: Path, tmp_path: Path
) -> None:
    """Every batch carries the list of candidates, which is no sample of it and is not to be divided."""
    words = ["--config", config, "--evaluate", "--output_dir", tmp_path, "--pretrained", compressed / "best"]
    run_script(ROOT / "compress_vqa.py", *words, "--set", "batch_size_test=24")
    for name in ("vqa_result.json", "vqa_result_val.json"):
        assert (tmp_path / "result" / name).read_text() == (compressed / "result" / name).read_text()


@pytest.mark.slow
def test_published_way_of_counting() -> None:
    with torch.device("meta"):
        model = BlipVqa(VqaConfig.vit("base"))
    model.to_empty(device="cpu")
    model.text_decoder.tie_weights()
    for buffer in model.buffers():
        buffer.zero_()
    counts = TASK.counts(model)
    assert counts["parameters"] == 361_478_972  # published as 361.6 M, with the masks of the search
    assert counts["published_gmacs"] == pytest.approx(186.12, abs=0.2)  # which counts norms too
    assert counts["gmacs"] == pytest.approx(108, abs=1)
