"""The retrieval task: recall, whole runs, evaluation in batches and over processes, and the published settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import runs
import upop
from together import run_script
from upop.checkpoints.files.weights import read_weights
from upop.demo.write import write_shapes
from upop.errors import CheckpointError, SettingError
from upop.models.retrieval import BlipRetrieval, RetrievalConfig
from upop.runs.devices import make_accelerator
from upop.runs.loaders import first_samples, make_loader
from upop.runs.verbs import compress, evaluate_checkpoint, train
from upop.settings import read_settings
from upop.tasks import find_task
from upop.tasks.retrieval import BlipRetrievalSettings

ROOT = Path(__file__).parents[2]
TASK = find_task("retrieval")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 pairs to train on, a dense model with random weights, and the settings for both."""
    folder = tmp_path_factory.mktemp("retrieval")
    return runs.make_task("retrieval", folder)


def settings_of(config: Path, **overrides: Any) -> BlipRetrievalSettings:
    return read_settings(BlipRetrievalSettings, config, overrides)


@pytest.fixture(scope="module")
def compressed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "2x"
    compress(TASK, settings_of(config, output_dir=folder))
    return folder


def published_recalls(scores: np.ndarray, right: list[set[int]], cut: int) -> float:
    """Full scores, sorted query by query."""
    hits = [bool(set(np.argsort(row)[::-1][:cut].tolist()) & wanted) for row, wanted in zip(scores, right, strict=True)]
    return 100 * sum(hits) / len(hits)


class _Gallery:
    def __init__(self, owner: list[int]) -> None:
        self.image_of_text = torch.tensor(owner)


def test_recalls_are_those_of_the_full_ranking(config: Path) -> None:
    draw = np.random.default_rng(0)
    images, texts = 30, 70
    owner = [*range(images), *draw.integers(0, images, texts - images).tolist()]
    similar = draw.normal(size=(images, texts))
    similar[owner, range(texts)] += 1.0
    matching = draw.normal(size=(images, texts))
    table = {}
    for names, first, second in (
        (("texts", "text_scores"), similar, matching),
        (("images", "image_scores"), similar.T, matching.T),
    ):
        chosen = np.argsort(-first, axis=1)[:, :12]
        table[names[0]] = torch.tensor(chosen)
        table[names[1]] = torch.tensor(np.take_along_axis(first + second, chosen, 1))
    found = TASK.score(table, _Gallery(owner), settings_of(config))
    for name, first, second, right in (
        ("TR", similar, matching, [{t for t in range(texts) if owner[t] == i} for i in range(images)]),
        ("IR", similar.T, matching.T, [{image} for image in owner]),
    ):
        chosen = np.argsort(-first, axis=1)[:, :12]
        scores = np.full(first.shape, -100.0)
        np.put_along_axis(scores, chosen, np.take_along_axis(first + second, chosen, 1), 1)
        for cut in (1, 5, 10):
            assert found[f"{name}@{cut}"] == pytest.approx(published_recalls(scores, right, cut))
    assert 0 < found["TR@1"] < found["TR@10"] < 100
    recalls = [value for name, value in found.items() if name != "r_mean"]
    assert len(recalls) == 6
    assert found["r_mean"] == pytest.approx(sum(recalls) / 6)


def collected(settings: BlipRetrievalSettings, model: nn.Module) -> dict[str, torch.Tensor]:
    accelerator = make_accelerator(settings)
    loader = accelerator.prepare(make_loader(TASK, settings, "val"))
    with torch.no_grad():
        return TASK.collect(accelerator, model.eval(), loader, settings)


def test_evaluation_is_one_query_at_a_time_in_batches(config: Path) -> None:
    """Candidates by similarity; each one's score is its similarity and its logit, whatever the size of a pass."""
    settings = settings_of(config)
    model = TASK.load(Path(str(settings.pretrained)), settings)
    found = collected(settings, model)
    samples = TASK.dataset(settings, "val")
    images = torch.stack([samples[index]["image"] for index in range(len(samples))])
    words = TASK.collate(settings).tokenize(samples.texts)
    with torch.no_grad():
        compared = model.eval()(images, **words)
    similar = compared.image_features @ compared.text_features.t()
    whole = similar + compared.logits[..., 1]
    assert found["texts"].shape == (len(images), 12)
    assert found["images"].shape == (len(samples.texts), 12)
    for names, table, scores in (
        (("texts", "text_scores"), similar, whole),
        (("images", "image_scores"), similar.t(), whole.t()),
    ):
        torch.testing.assert_close(table.gather(1, found[names[0]]), table.topk(12).values, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[names[1]], scores.gather(1, found[names[0]]), rtol=1e-4, atol=1e-5)
    small = collected(settings_of(config, rerank_batch=3, batch_size_test=7), model)
    for name, value in found.items():
        torch.testing.assert_close(small[name], value, rtol=1e-4, atol=1e-5)


def test_more_candidates_than_there_are_means_all(config: Path) -> None:
    settings = settings_of(config, k_test=10_000)
    model = TASK.load(Path(str(settings.pretrained)), settings)
    found = collected(settings, model)
    samples = TASK.dataset(settings, "val")
    assert found["texts"].shape == (len(samples), len(samples.texts))
    assert found["images"].shape == (len(samples.texts), len(samples))


def test_run_folder_and_results(config: Path, compressed: Path, tmp_path: Path) -> None:
    results = json.loads((compressed / "results.json").read_text())
    dense, small = results["models"]
    model = upop.load(compressed / "best")
    assert isinstance(model, BlipRetrieval)
    assert set(small["metrics"]["test"]) == {*(f"{way}@{k}" for way in ("TR", "IR") for k in (1, 5, 10)), "r_mean"}
    assert small["published_parameters"] == upop.count_parameters(model)
    copies = sum(copy.numel() for _, copy in model.momentum_pairs())
    assert small["parameters"] == upop.count_parameters(model) - copies
    assert copies > 0.9 * small["parameters"]
    assert small["parameters"] < dense["parameters"]
    assert dense["published_gmacs"] > 2 * dense["gmacs"]
    assert small["published_gmacs"] < dense["published_gmacs"]
    again = evaluate_checkpoint(
        TASK, settings_of(config, pretrained=str(compressed / "best"), output_dir=tmp_path / "again")
    )
    assert again is not None
    assert dict(again.models[0].metrics) == small["metrics"]


def test_a_published_file_of_the_compressed_model_is_the_same_model(
    config: Path, compressed: Path, tmp_path: Path
) -> None:
    """Kept sizes are read off the shapes, those of the momentum copies too."""
    model = upop.load(compressed / "best")
    torch.save({"model": model.state_dict()}, tmp_path / "published.pth")
    settings = settings_of(config)
    again = TASK.load(tmp_path / "published.pth", settings)
    assert {key: part.shape for key, part in again.state_dict().items()} == {
        key: part.shape for key, part in model.state_dict().items()
    }
    # Text attention is scaled alike in both formats; that of the vision transformer is not.
    words = TASK.collate(settings).tokenize(["a red circle", "a blue one"])
    with torch.no_grad():
        for momentum in (False, True):
            found, expected = (
                kind.eval().encode_text(words["input_ids"], words["attention_mask"], momentum=momentum)[1]
                for kind in (again, model)
            )
            assert torch.equal(found, expected)


@pytest.mark.slow
def test_queue_of_another_size_is_remade(config: Path, tmp_path: Path) -> None:
    settings = settings_of(config, queue_size=24)
    dense = Path(str(settings.pretrained))
    torch.save({"model": upop.load(dense).state_dict()}, tmp_path / "published.pth")
    for path in (dense, tmp_path / "published.pth"):
        model = TASK.load(path, settings)
        assert model.image_queue.shape == (16, 24)
        assert model.config.queue_size == 24
        assert model.idx_queue.eq(-100).all()
    same = TASK.load(dense, settings_of(config))
    assert torch.equal(same.image_queue, upop.load(dense).image_queue)


def test_fine_tuning_starts_from_a_checkpoint_without_momentum(config: Path, tmp_path: Path) -> None:
    settings = settings_of(config)
    state = upop.load(str(settings.pretrained)).state_dict()
    kept = {key: part for key, part in state.items() if key.startswith(("visual_encoder.", "text_encoder."))}
    torch.save({"model": {**kept, "text_decoder.cls.bias": torch.zeros(3)}}, tmp_path / "pretrained.pth")
    model, lacking = TASK.start(tmp_path / "pretrained.pth", settings)
    assert {name.split(".")[0] for name in lacking} == {
        *("vision_proj", "text_proj", "itm_head", "temp"),
        *("visual_encoder_m", "text_encoder_m", "vision_proj_m", "text_proj_m"),
    }
    for parameter, copy in model.momentum_pairs():
        assert torch.equal(parameter, copy)
    assert torch.equal(model.visual_encoder.norm.weight, state["visual_encoder.norm.weight"])


def test_a_checkpoint_of_another_task_is_refused(config: Path, tmp_path: Path) -> None:
    settings = settings_of(config)
    state = upop.load(str(settings.pretrained)).state_dict()
    del state["itm_head.weight"]
    torch.save({"model": state}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth lacks itm_head\.weight"):
        TASK.load(tmp_path / "other.pth", settings)


def test_queue_smaller_than_the_batch_is_refused_before_any_work(config: Path, tmp_path: Path) -> None:
    settings = settings_of(config, queue_size=8, output_dir=tmp_path)
    with pytest.raises(SettingError, match=r"queue_size is 8.*16 samples.*Set queue_size to 16"):
        train(TASK, settings)


@pytest.mark.filterwarnings("ignore:Some pairs of a batch have no hard negative")
@pytest.mark.slow
def test_a_batch_of_one_trains(config: Path, tmp_path: Path) -> None:
    results = train(TASK, settings_of(config, batch_size_train=1, batch_size_test=1, output_dir=tmp_path))
    assert results is not None
    assert all(np.isfinite(value) for value in results.models[0].metrics["val"].values())
    state = read_weights(tmp_path / "best" / "model.safetensors")
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"amp": True}, {"vit_grad_ckpt": True, "vit_ckpt_layer": 1}], ids=str)
def test_variants_run_through(config: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    results = compress(TASK, settings_of(config, output_dir=tmp_path, **changes))
    assert results is not None
    assert results.models[1].parameters < results.models[0].parameters


def test_soft_targets_grow_over_the_first_epoch(config: Path) -> None:
    settings = settings_of(config, alpha=0.4)
    assert [settings.alpha_at(epoch) for epoch in (0, 0.25, 1, 3.5)] == pytest.approx([0, 0.1, 0.4, 0.4])
    # ... and the loss takes them as they are.
    model = TASK.load(Path(str(settings.pretrained)), settings).eval()
    batch = first_samples(make_loader(TASK, settings, "train"), 12)  # five captions an image
    losses = []
    for epoch in (0.0, 0.5):
        torch.manual_seed(1)
        found = TASK.loss(model, batch, settings, epoch)
        torch.manual_seed(1)
        expected = sum(model(**TASK.inputs(batch), ids=batch["ids"], alpha=0.4 * epoch))
        assert torch.equal(found, expected)
        losses.append(float(found.detach()))
    assert losses[0] != losses[1]


@pytest.mark.parametrize(("name", "dataset"), [("retrieval_coco", "coco"), ("retrieval_flickr", "flickr")])
def test_published_settings_are_the_defaults(name: str, dataset: str) -> None:
    path = ROOT / "configs" / f"{name}.yaml"
    found = read_settings(BlipRetrievalSettings, path, {})
    plain = BlipRetrievalSettings(dataset=dataset)  # type: ignore[arg-type]
    given = {key: getattr(found, key) for key in yaml.safe_load(path.read_text())}
    same = {key: value for key, value in given.items() if key not in ("pretrained", "vit_grad_ckpt", "vit_ckpt_layer")}
    assert same == {key: getattr(plain, key) for key in same}
    assert (found.interval, found.k_test) == ((200, 256) if dataset == "coco" else (50, 128))
    assert BlipRetrievalSettings(dataset=dataset, interval=7).interval == 7  # type: ignore[arg-type]


def test_flickr_reads_its_own_files(tmp_path: Path) -> None:
    data = write_shapes("retrieval-flickr", tmp_path / "flickr", seed=3, size=20, image_size=32)
    settings = BlipRetrievalSettings(dataset="flickr", **data.settings)  # type: ignore[arg-type]
    assert len(TASK.dataset(settings, "train")) == 20  # type: ignore[arg-type]
    assert len(TASK.dataset(settings, "test")) > 0  # type: ignore[arg-type]


@pytest.mark.slow
def test_published_way_of_counting() -> None:
    with torch.device("meta"):
        model = BlipRetrieval(RetrievalConfig.vit("base"))
    model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.zero_()
    counts = TASK.counts(model)
    assert counts["published_parameters"] == 447_486_979
    assert counts["parameters"] == 223_744_259
    assert counts["published_gmacs"] == pytest.approx(153.243, abs=0.2)
    assert counts["gmacs"] < 75


@pytest.mark.slow
def test_two_processes_are_one(config: Path, tmp_path: Path) -> None:
    """The published command, with half the batch in each of two processes."""
    results = []
    for processes in (1, 2):
        size = 16 // processes
        sized = config.with_name(f"{processes}.yaml")
        changes = {"batch_size_train": size, "batch_size_test": size}
        sized.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), **changes}))
        words = ["--config", sized, "--epoch", "1", "--output_dir", tmp_path / str(processes)]
        run_script(ROOT / "compress_retrieval.py", *words, processes=processes)
        results.append(tmp_path / str(processes))
    plans = [upop.Plan.from_json((folder / "plan.json").read_text()) for folder in results]
    assert dict(plans[0]) == dict(plans[1])
    one, two = (read_weights(folder / "last" / "model.safetensors") for folder in results)
    assert torch.equal(one["idx_queue"], two["idx_queue"])
    torch.testing.assert_close(one["image_queue"], two["image_queue"], rtol=1e-3, atol=1e-3)
    first, second = (json.loads((folder / "results.json").read_text())["models"] for folder in results)
    assert [model["metrics"] for model in first] == [model["metrics"] for model in second]


@pytest.mark.slow
def test_benchmark_of_re_ranking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import rerank

    asked = "--model tiny --images 6 --candidates 4 --batch 8 --repeats 2 --threads 1"
    rerank.main([*asked.split(), "--out", str(tmp_path)])
    [file] = tmp_path.glob("rerank_*.json")
    found = json.loads(file.read_text())
    assert found["pairs_asked"] == 6 * 4 + 30 * 4
    assert found["largest_difference"] < 1e-5
    assert found["fewer_multiply_adds"] > 1.5
    assert found["speed_up"] > 0
