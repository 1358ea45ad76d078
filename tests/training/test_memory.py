"""Memory: what a step takes, the batch that fits, and what is said when memory is used up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

import runs
from upop.errors import OutOfMemoryError, SettingError
from upop.runs import batch as batch_module
from upop.runs import memory
from upop.runs.batch import find_batch_size
from upop.runs.devices import make_accelerator
from upop.runs.loaders import make_loader
from upop.runs.memory import explained_memory, format_bytes, free_bytes, is_out_of_memory, peak_bytes, saved_bytes
from upop.runs.verbs import compress, evaluate_checkpoint, train
from upop.settings import RunSettings, read_settings
from upop.tasks import find_task
from upop.tasks.nlvr import NlvrTask

_ABSURD = 10**14


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_data(tmp_path_factory.mktemp("nlvr"))


def test_the_peak_is_what_is_alive_at_once() -> None:
    outside = torch.ones(1000, dtype=torch.float64)

    def step() -> None:
        first = outside * 2  # 8000 bytes
        second = first + 1  # 16000
        view = second.view(10, 100)
        del first, second  # 8000, for the view holds its storage
        third = [torch.zeros(1000) for _ in range(3)]  # 20000
        del third
        view.sum()

    assert peak_bytes(step) == 20000


def test_the_peak_of_a_step_has_gradients_and_grows_with_the_batch() -> None:
    layer = nn.Linear(300, 200)

    def step(samples: int) -> None:
        layer(torch.ones(samples, 300)).relu().sum().backward()
        layer.zero_grad(set_to_none=True)

    few, more = (peak_bytes(lambda count=count: step(count)) for count in (10, 20))
    assert few >= 4 * (300 * 200 + 200)
    assert more - few == 10 * 4 * (300 + 200)  # the inputs, and the gradient of the outputs


def test_saved_bytes_are_those_of_activations() -> None:
    model = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 5))
    inputs = torch.ones(8, 30)
    # What the first layer is given, and what comes out of the ReLU; weights are the model's own.
    assert saved_bytes(lambda: model(inputs), model) == 4 * 8 * (30 + 20)


class _Greedy(NlvrTask):
    """Asks for absurd memory: in a training step, in an evaluation, or in a process that decodes."""

    def __init__(self, training: bool = False, predicting: bool = False) -> None:
        self.training, self.predicting = training, predicting

    def loss(self, *given: Any) -> Tensor:
        extra = torch.empty(_ABSURD).sum() if self.training else 0
        return super().loss(*given) + extra

    def predict(self, *given: Any) -> dict[str, Tensor]:
        if self.predicting:
            torch.empty(_ABSURD)
        return super().predict(*given)


def test_a_training_step_that_does_not_fit_says_what_to_change(config: Path, tmp_path: Path) -> None:
    _, settings = runs.nlvr(config, output_dir=tmp_path, pretrained=None)
    with pytest.raises(OutOfMemoryError) as error:
        train(_Greedy(training=True), settings)
    message = str(error.value)
    for part in (
        "Out of memory on cpu",
        "batches of 16 samples",
        "batch_size_train=8 with accumulate=2",
        "--batch-size auto",
        "--amp",
        "--grad-checkpointing",
        str(tmp_path),
        "--resume",
        "can't allocate memory",
    ):
        assert part in message
    assert isinstance(error.value, MemoryError)


def test_what_is_on_already_is_not_advised(config: Path, tmp_path: Path) -> None:
    given = {"output_dir": tmp_path, "pretrained": None, "amp": True, "grad_checkpointing": True, "batch_size_train": 1}
    with pytest.raises(OutOfMemoryError) as error:
        train(_Greedy(training=True), runs.nlvr(config, **given)[1])
    assert not any(part in str(error.value) for part in ("--amp", "--grad-checkpointing", "accumulate=2"))


def test_an_evaluation_that_does_not_fit_names_its_own_settings(config: Path, tmp_path: Path) -> None:
    _, settings = runs.nlvr(config, output_dir=tmp_path)
    with pytest.raises(OutOfMemoryError, match=r"Lower batch_size_test \(now 48\), which changes no result"):
        evaluate_checkpoint(_Greedy(predicting=True), settings)
    with pytest.raises(OutOfMemoryError, match="happened in an evaluation"):
        compress(_Greedy(predicting=True), settings)


def test_a_run_that_did_not_fit_goes_on_with_smaller_batches(config: Path, tmp_path: Path) -> None:
    class Grows(NlvrTask):
        left = 6

        def loss(self, *given: Any) -> Tensor:
            self.left -= 1
            if self.left < 0:
                torch.empty(_ABSURD)
            return super().loss(*given)

    given = {"output_dir": tmp_path, "pretrained": None, "max_epoch": 2, "examples": 0}
    with pytest.raises(OutOfMemoryError):
        train(Grows(), runs.nlvr(config, **given)[1])
    smaller = {"batch_size_train": 8, "accumulate": 2, "grad_checkpointing": True, "resume": "must"}
    assert train(*runs.nlvr(config, **given, **smaller)) is not None
    assert [row["step"] for row in runs.rows(tmp_path) if "loss" in row] == list(range(1, 9))


def test_a_worker_ended_by_the_system_is_told_apart() -> None:
    with (
        pytest.raises(OutOfMemoryError, match=r"Lower num_workers \(now 3\)"),
        explained_memory(RunSettings(num_workers=3), torch.device("cpu")),
    ):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), SettingError("no"), KeyError("x")])
def test_other_errors_pass(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as found, explained_memory(RunSettings(), torch.device("cpu")):
        raise error
    assert found.value is error


def test_free_memory_is_shared_by_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = free_bytes(torch.device("cpu"))
    assert 2**20 < whole < 2**50
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes(torch.device("cpu")) < whole / 2  # others use the machine meanwhile


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_free_memory_is_what_the_control_group_of_the_process_leaves(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit of 4 GiB, of which 3 are used, one of them for files that can be dropped: 2 are free."""
    inside = tmp_path / ("memory/a" if version == "v1" else "a")
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == "v1" else ("memory.max", "memory.current")
    inside.mkdir(parents=True)
    for name, count in zip(names, (4, 3), strict=True):
        (inside / name).write_text(f"{count * 2**30}\n")
    (inside / "memory.stat").write_text(f"cache 7\ninactive_file {2**30}\n")
    (tmp_path / "cgroup").write_text("4:memory:/a\n0::/\n" if version == "v1" else "0::/a\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_OF_PROCESS", tmp_path / "cgroup")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**40))
    assert free_bytes(torch.device("cpu")) == 2 * 2**30


def test_free_memory_is_what_the_limit_of_the_process_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    mapped = psutil.Process().memory_info().vms
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (mapped + 2**28, mapped + 2**28))
    assert 2**27 < free_bytes(torch.device("cpu")) <= 2**28 + 2**26


@pytest.mark.parametrize(("count", "words"), [(3 * 2**29, "1.50 GiB"), (12 * 2**20, "12.00 MiB")])
def test_bytes_are_told_in_words(count: int, words: str) -> None:
    assert format_bytes(count) == words


def limited(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(batch_module, "free_bytes", lambda _device: free)


def found_batch(config: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, free: int, **given: Any) -> Any:
    limited(monkeypatch, free)
    task, settings = runs.nlvr(config, output_dir=folder, **given)
    model = task.load(Path(str(settings.pretrained)), settings)
    return find_batch_size(make_accelerator(settings), task, settings, model, make_loader(task, settings, "train"))


def test_the_batch_fills_the_memory_and_no_more(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is predicted of a step is what a step takes, up to gradients that come while activations go."""
    small = found_batch(config, tmp_path, monkeypatch, 2**50, batch_size_train=64)
    assert small.size == 64
    assert small.per_sample > 0
    free = int((small.fixed + 20 * small.per_sample) / 0.8)
    fitting = found_batch(config, tmp_path, monkeypatch, free, batch_size_train=64)
    assert (fitting.size, fitting.accumulate) == (16, 4)
    task, settings = runs.nlvr(config)
    model = task.load(Path(str(settings.pretrained)), settings).train()
    optimizer = task.optimizer(model, settings)
    loader = make_loader(task, settings, "train")
    batch = batch_module._Probe(make_accelerator(settings), task, settings, model, loader, False)._batch(16)

    def steps() -> None:
        for _ in range(2):
            task.loss(model, batch, settings, 0.0).backward()
            optimizer.step()
            optimizer.zero_grad()

    taken, weights = peak_bytes(steps), sum(parameter.nbytes for parameter in model.parameters())
    predicted = small.fixed + 16 * small.per_sample - weights  # the dense copy, which is not made here
    assert taken <= predicted <= 1.1 * (taken + weights)  # gradients and all activations are not there at once


def test_samples_per_step_stay_as_named(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = found_batch(config, tmp_path, monkeypatch, 2**50, batch_size_train=24, accumulate=2)
    assert (one.size, one.accumulate) == (48, 1)
    free = int((one.fixed + 14 * one.per_sample) / 0.8)
    other = found_batch(config, tmp_path, monkeypatch, free, batch_size_train=24, accumulate=2)
    assert (other.size, other.accumulate) == (12, 4)


def test_a_model_that_is_shared_out_needs_a_number(config: Path) -> None:
    task, settings = runs.nlvr(config)
    loader, accelerator = make_loader(task, settings, "train"), make_accelerator(settings)
    model = task.load(Path(str(settings.pretrained)), settings)
    sharded = settings.model_copy(update={"sharding": "fsdp"})
    with pytest.raises(SettingError, match=r"distributes it over several\. Give a number"):
        find_batch_size(accelerator, task, sharded, model, loader)


def test_too_little_memory_is_said(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutOfMemoryError, match=r"finds no batch that fits.*0\.00 MiB are free.*amp"):
        found_batch(config, tmp_path, monkeypatch, 1000)


def test_finding_a_batch_leaves_the_model_and_chance_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(monkeypatch, 2**50)
    config = runs.make_task("retrieval", tmp_path)  # whose queues and momentum copies move in every step
    task = find_task("retrieval")
    settings = read_settings(task.settings, config, {})
    model = task.load(Path(str(settings.pretrained)), settings).eval()
    accelerator, loader = make_accelerator(settings), make_loader(task, settings, "train")
    before, drawn = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    found = find_batch_size(accelerator, task, settings, model, loader)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert found.size <= settings.queue_size


def test_images_that_are_mixed_come_in_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = runs.make_task("classification", tmp_path, batch_size_train=30)
    task = find_task("classification")
    settings = read_settings(task.settings, config, {})
    model = task.load(Path(str(settings.pretrained)), settings)
    loader, accelerator = make_loader(task, settings, "train"), make_accelerator(settings)
    limited(monkeypatch, 2**50)
    whole = find_batch_size(accelerator, task, settings, model, loader)
    limited(monkeypatch, int((whole.fixed + 16 * whole.per_sample) / 0.8))
    part = find_batch_size(accelerator, task, settings, model, loader)
    assert (whole.size, part.size, part.accumulate) == (30, 10, 3)  # not 15


def test_a_run_finds_its_batch_and_a_resumed_one_keeps_it(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = found_batch(config, tmp_path / "other", monkeypatch, 2**50)
    limited(monkeypatch, int((one.fixed + 9 * one.per_sample) / 0.8))
    given = {"output_dir": tmp_path / "run", "batch_size_train": "auto", "max_epoch": 1, "examples": 0, "distill": 0.0}
    assert compress(*runs.nlvr(config, **given)) is not None
    written = (tmp_path / "run" / "settings.yaml").read_text().splitlines()
    assert {"batch_size_train: 8", "accumulate: 2", "batch_size_auto: true"} <= set(written)
    assert "batches of 8 samples, 2 of them per step" in capsys.readouterr().out
    assert len([row for row in runs.rows(tmp_path / "run") if "loss" in row]) == 8
    limited(monkeypatch, 2**50)  # with which 16 would fit
    assert compress(*runs.nlvr(config, **given, resume="must")) is not None
    assert "batch_size_train: 8" in (tmp_path / "run" / "settings.yaml").read_text().splitlines()


def test_without_a_named_number_the_largest_batch_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml

    config = runs.make_data(tmp_path)
    content = yaml.safe_load(config.read_text())
    del content["batch_size_train"]
    config.write_text(yaml.safe_dump(content))
    one = found_batch(config, tmp_path, monkeypatch, 2**50, batch_size_train="auto")
    assert (one.size, one.accumulate) == (64, 1)  # all there are
    free = int((one.fixed + 30 * one.per_sample) / 0.8)
    assert found_batch(config, tmp_path, monkeypatch, free, batch_size_train="auto").size == 24
