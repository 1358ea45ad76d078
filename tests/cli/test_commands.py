"""The commands as a person types them: what works, and what each mistake says."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import runs
from upop.settings import RunSettings, read_settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_data(tmp_path_factory.mktemp("nlvr"))


def test_help_teaches(upop_command: Callable[..., tuple[int, str]]) -> None:
    for words in ([], ["train"], ["compress"], ["evaluate"], ["data", "shapes"], ["demo"]):
        code, text = upop_command(*words, "--help")
        assert code == 0
        assert "Example: upop" in text


@pytest.mark.slow
def test_published_pair_of_commands(config: Path, tmp_path: Path, root_script: Callable[..., tuple[int, str]]) -> None:
    command = ["compress_nlvr.py", "--config", config, "--device", "cpu"]
    flags = ["--p", "0.5", "--epoch", "1", "--w_sp_attn", "4.8e-3", "--w_sp_mlp", "2e-4", "--seed", "42"]
    ignored = ["--world_size", "1", "--dist_url", "env://", "--distributed", "True"]
    folder = tmp_path / "2x"
    code, text = root_script(*command, *flags, *ignored, "--output_dir", folder)
    assert code == 0, text
    assert re.search(r"reference 1\.\d+x", text)
    # A published file holds {"model": state dict}; ours has the same layout.
    from upop.checkpoints import read_weights

    published = tmp_path / "compressed.pth"
    torch.save({"model": read_weights(folder / "best" / "model.safetensors")}, published)
    code, text = root_script(*command, "--evaluate", "--pretrained", published, "--output_dir", tmp_path / "e")
    assert code == 0, text
    assert "compressed.pth" in text


def test_settings_of_another_method_are_refused(
    config: Path, tmp_path: Path, upop_command: Callable[..., tuple[int, str]]
) -> None:
    given = ("compress", "nlvr", "--config", config, "--output-dir", tmp_path / "run")
    code, text = upop_command(*given, "--interval", "5")
    assert code == 1
    assert "--interval 5" in text and "the method is upop" in text
    code, text = upop_command(*given, "--cost", "reference")
    assert code == 1
    assert "set method: reference" in text
    assert not (tmp_path / "run").exists()


def test_use_ceph_is_refused(root_script: Callable[..., tuple[int, str]]) -> None:
    code, text = root_script("compress_nlvr.py", "--use_ceph")
    assert code == 1
    assert "--use_ceph" in text
    assert "Traceback" not in text


def test_data_shapes_writes_the_published_layout(upop_command: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    code, text = upop_command("data", "shapes", "--task", "nlvr", "--out", tmp_path / "d", "--seed", 5, "--size", 40)
    assert code == 0
    assert "40 train" in text
    samples = json.loads((tmp_path / "d" / "annotation" / "nlvr_train.json").read_text())
    assert set(samples[0]) == {"sentence", "label", "images"}
    code, text = upop_command("data", "shapes", "--out", tmp_path / "d", "--seed", 6, "--size", 40)
    assert code == 1
    assert "Traceback" not in text


def _pickled(path: Path) -> None:
    torch.save({"model": {"weight": Path("x")}}, path)


MISTAKES: list[tuple[str, list[str], list[str]]] = [
    ("task", ["compress", "nlvrr"], ["nlvrr", "did you mean 'nlvr'"]),
    ("config missing", ["compress", "nlvr", "--config", "nowhere.yaml"], ["nowhere.yaml", "there is none"]),
    ("set", ["compress", "nlvr", "--set", "workers"], ["KEY=VALUE", "workers"]),
    ("unknown key", ["compress", "nlvr", "--set", "init_lrr=1"], ["init_lrr", "did you mean 'init_lr'"]),
    (
        "ratio",
        ["compress", "nlvr", "--ratio", "1.5"],
        ["ratio: Input should be a number", "1.5, from --ratio"],
    ),
    ("p", ["compress", "nlvr", "--p", "50"], ["write 0.5 for 50 %", "from --p"]),
    ("epochs", ["compress", "nlvr", "--epochs", "0"], ["epochs: Input", "found 0, from --epochs"]),
    ("epoch", ["compress", "nlvr", "--epoch", "0"], ["max_epoch", "0"]),
    ("cost", ["compress", "nlvr", "--cost", "parms"], ["cost", "params", "parms"]),
]


@pytest.mark.parametrize(("words", "said"), [case[1:] for case in MISTAKES], ids=[case[0] for case in MISTAKES])
def test_mistakes_in_settings(upop_command: Callable[..., tuple[int, str]], words: list[str], said: list[str]) -> None:
    code, text = upop_command(*words)
    assert code == 1
    for part in said:
        assert part in text
    assert "Traceback" not in text


def _edit_samples(change: Callable[[list[dict[str, Any]]], Any]) -> Callable[[Path], None]:
    def edit(data: Path) -> None:
        file = data / "annotation" / "nlvr_dev.json"
        samples = json.loads(file.read_text())
        change(samples)
        file.write_text(json.dumps(samples))

    return edit


BAD_DATA: list[tuple[str, Callable[[Path], None], list[str]]] = [
    ("not JSON", lambda data: (data / "annotation/nlvr_dev.json").write_text("[{"), ["nlvr_dev.json"]),
    ("no file", lambda data: (data / "annotation/nlvr_dev.json").unlink(), ["nlvr_dev.json"]),
    (
        "label",
        _edit_samples(lambda r: r[17].update(label="true")),
        ["nlvr_dev.json", "sample 17", "label", "true"],
    ),
    ("key", _edit_samples(lambda r: r[3].pop("sentence")), ["sample 3", "sentence"]),
    (
        "image",
        _edit_samples(lambda r: r[5].update(images=["gone.png", "gone.png"])),
        ["sample 5", "gone.png"],
    ),
    ("tokenizer", lambda data: shutil.rmtree(data / "tokenizer"), ["tokenizer"]),
]


@pytest.mark.parametrize(("harm", "said"), [case[1:] for case in BAD_DATA], ids=[case[0] for case in BAD_DATA])
def test_bad_data_is_named_before_training(
    upop_command: Callable[..., tuple[int, str]],
    tmp_path: Path,
    harm: Callable[[Path], None],
    said: list[str],
) -> None:
    config = runs.make_data(tmp_path)
    harm(tmp_path / "data")
    code, text = upop_command("compress", "nlvr", "--config", config, "--output-dir", tmp_path / "run")
    assert code == 1
    for part in said:
        assert part in text
    assert "Traceback" not in text
    assert not (tmp_path / "run" / "plan.json").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_truncated_image_is_named(upop_command: Callable[..., tuple[int, str]], tmp_path: Path, workers: int) -> None:
    config = runs.make_data(tmp_path)
    sample = json.loads((tmp_path / "data/annotation/nlvr_dev.json").read_text())[2]
    image = tmp_path / "data/images/NLVR2" / sample["images"][0]
    image.write_bytes(image.read_bytes()[:80])
    code, text = upop_command(
        "evaluate",
        "nlvr",
        "--config",
        config,
        "--output-dir",
        tmp_path / "run",
        "--set",
        f"num_workers={workers}",
    )
    assert code == 1
    assert image.name in text
    assert "nlvr_dev.json" in text
    assert "sample" in text
    assert "Traceback" not in text


BAD_CHECKPOINTS: list[tuple[str, Callable[[Path], None], list[str]]] = [
    ("text", lambda path: path.write_text("hello"), ["no checkpoint"]),
    ("objects", _pickled, ["refused", "objects"]),
    (
        "shapes",
        lambda path: torch.save({"model": {"cls_head.0.weight": torch.zeros(3)}}, path),
        ["lacks", "patch_embed"],
    ),
    ("missing", lambda path: None, ["nothing was found"]),
]


@pytest.mark.parametrize(("make", "said"), [case[1:] for case in BAD_CHECKPOINTS], ids=[c[0] for c in BAD_CHECKPOINTS])
def test_bad_checkpoints(
    upop_command: Callable[..., tuple[int, str]],
    config: Path,
    tmp_path: Path,
    make: Callable[[Path], None],
    said: list[str],
) -> None:
    path = tmp_path / "bad.pth"
    make(path)
    code, text = upop_command(
        "compress", "nlvr", "--config", config, "--pretrained", path, "--output-dir", tmp_path / "run"
    )
    assert code == 1
    for part in ["bad.pth", *said]:
        assert part in text


def test_every_config_is_read() -> None:
    from upop.tasks import find_task

    files = sorted((ROOT / "configs").rglob("nlvr*.yaml"))
    assert len(files) >= 2
    for file in files:
        settings = read_settings(find_task("nlvr").settings, file, {})
        assert isinstance(settings, RunSettings)
        given = yaml.safe_load(file.read_text())
        assert settings.init_lr == given["init_lr"]
        assert settings.image_size == given["image_size"]


def test_resolved_settings_can_be_read_again(config: Path, tmp_path: Path) -> None:
    _, settings = runs.nlvr(config)
    path = tmp_path / "settings.yaml"
    path.write_text(settings.to_yaml())
    assert read_settings(type(settings), path, {}) == settings


def test_missing_data_is_named_where_nothing_is_set_up(
    upop_command: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, text = upop_command("train", "nlvr", "--output-dir", tmp_path / "run")
    assert code == 1
    assert "nlvr_train.json" in text
    assert f"relative to {tmp_path}" in text and "--set ann_root=" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("task", "flags", "described"),
    [
        ("classification", (), "data_path is datasets/vision/imagenet, the default, relative to"),
        ("classification", ("--data-path", "mine"), "data_path is mine, relative to"),
        ("segmentation", (), "dataset_root is datasets/vision, the default, relative to"),
        ("retrieval", ("--set", "ann_root=mine"), "ann_root is mine, relative to"),
    ],
)
def test_missing_data_is_told_with_the_setting_that_names_its_folder(
    upop_command: Callable[..., tuple[int, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    task: str,
    flags: tuple[str, ...],
    described: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATASET", raising=False)
    code, text = upop_command("train", task, "--output-dir", tmp_path / "run", *flags)
    assert code == 1
    assert f"{described} {tmp_path}" in text


def test_missing_images_of_a_data_set_are_told_with_its_default(
    upop_command: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = runs.make_task("retrieval", tmp_path)
    settings = yaml.safe_load(config.read_text())
    del settings["image_root"]
    config.write_text(yaml.safe_dump(settings | {"ann_root": str(Path(settings["ann_root"]).resolve())}))
    monkeypatch.chdir(tmp_path)
    code, text = upop_command("train", "retrieval", "--config", config, "--output-dir", tmp_path / "run")
    assert code == 1
    assert f"image_root is datasets/vision/coco, the default, relative to {tmp_path}" in text
