"""The callback for transformers' Trainer: one training, the same as a loop by hand, that resumes and reloads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import (
    AutoModelForImageClassification,
    CLIPConfig,
    CLIPForImageClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers import TrainerCallback as Plain

import upop
from tiers import mostly_slow
from upop.errors import CheckpointError, SettingError, StepError
from upop.integrations import TrainerCallback


def usual(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 0.05,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
    }


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    return TrainingArguments(**{**usual(folder), **settings})


def trainer(model: Any, data: Any, folder: Path, *callbacks: Any, **settings: Any) -> Trainer:
    return Trainer(model=model, args=arguments(folder, **settings), train_dataset=data, callbacks=list(callbacks))


def clip() -> Any:
    # Not ViT: transformers 5.24 saves it under older names, which its Trainer does not find when it resumes.
    torch.manual_seed(1)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    config = CLIPConfig(vision_config={**sizes, "image_size": 16, "patch_size": 8}, num_labels=3)
    return CLIPForImageClassification(config)


def test_one_training_searches_cuts_recovers_and_reloads(classifier: Any, image_set: Any, tmp_path: Path) -> None:
    dense = upop.count_parameters(classifier)
    images = image_set[0]["pixel_values"].unsqueeze(0)
    callback = TrainerCallback(ratio=0.5, verify={"pixel_values": images})
    one = trainer(classifier, image_set, tmp_path / "run", callback, optim="adamw_torch", learning_rate=1e-3)
    one.train()
    assert callback.compression is not None and not callback.compression.searching
    assert upop.count_parameters(classifier) < 0.7 * dense
    assert classifier.config.quantization_config["quant_method"] == "upop"
    one.save_model(str(tmp_path / "out"))
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    classifier.eval()
    with torch.no_grad():
        assert torch.equal(again(images).logits, classifier(images).logits)


@pytest.mark.parametrize(
    "settings",
    mostly_slow([{}, {"accumulate": 2}, {"max_grad_norm": 0.05}, {"bf16": True}], {"accumulate": 2}),
    ids=str,
)
def test_it_is_the_loop_by_hand(classifier: Any, image_set: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
    model = copy.deepcopy(classifier).train()
    accumulate, most = settings.pop("accumulate", 1), settings.get("max_grad_norm", 0.0)
    callback = TrainerCallback(ratio=0.5)
    first = trainer(classifier, image_set, tmp_path, callback, gradient_accumulation_steps=accumulate, **settings)
    seen: list[Any] = []
    taken = first.get_batch_samples
    first.get_batch_samples = lambda *a, **k: _kept(taken(*a, **k), seen)  # type: ignore[method-assign]
    first.train()
    assert first.args.max_grad_norm == most

    compression = upop.Compression(model, 0.5, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for group in seen[:6]:
        for batch in group:
            with torch.autocast("cpu", enabled="bf16" in settings):
                loss = model(**batch).loss
            (compression.loss(loss) / len(group)).backward()
        if most:
            torch.nn.utils.clip_grad_norm_(model.parameters(), most)
        compression.step(optimizer)
        optimizer.zero_grad()
    assert callback.compression is not None
    assert callback.compression.plan() == compression.plan()
    near = {"rtol": 1e-2, "atol": 1e-2} if "bf16" in settings else {"rtol": 1e-4, "atol": 1e-6}
    for name, value in model.state_dict().items():
        torch.testing.assert_close(classifier.state_dict()[name], value, **near)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch.compile, which looks for it everywhere
def test_a_model_that_the_trainer_compiles_is_corrected_from_the_first_step_on(image_set: Any, tmp_path: Path) -> None:
    torch.compiler.reset()
    found = []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        model, callback = clip(), TrainerCallback(ratio=0.5, search_steps=1, teacher=False)
        one = trainer(model, image_set, tmp_path, callback, max_steps=2, **settings)
        one.train()
        assert (one.model_wrapped is model) is not bool(settings)
        assert callback.compression is not None and callback.compression.pruner is not None
        found.append((callback.compression.plan(), callback.compression.pruner.corrections, model.state_dict()))
    (plan, corrections, weights), (compiled_plan, compiled_corrections, compiled_weights) = found
    assert min(corrections.values()) < 1
    assert compiled_corrections == pytest.approx(corrections)
    assert compiled_plan == plan
    for name, value in weights.items():
        torch.testing.assert_close(compiled_weights[name], value, rtol=1e-5, atol=1e-6)
    torch.compiler.reset()


def _kept(found: Any, seen: list[Any]) -> Any:
    seen.append([{name: value.clone() for name, value in batch.items()} for batch in found[0]])
    return found


@pytest.mark.parametrize("step", [1, 4])
def test_it_goes_on_from_a_checkpoint_before_and_after_the_cut(image_set: Any, tmp_path: Path, step: int) -> None:
    model, other, third = clip(), clip(), clip()
    whole, resumed = TrainerCallback(ratio=0.5), TrainerCallback(ratio=0.5, teacher=True)
    saving = {"save_strategy": "steps", "save_steps": step, "optim": "adamw_torch", "learning_rate": 1e-2}
    trainer(model, image_set, tmp_path, whole, **saving).train()
    checkpoint = tmp_path / f"checkpoint-{step}"
    trainer(other, image_set, tmp_path, resumed, **saving).train(resume_from_checkpoint=str(checkpoint))
    assert whole.compression is not None and resumed.compression is not None
    assert resumed.compression.plan() == whole.compression.plan()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    (checkpoint / "upop_compression.pt").unlink()
    with pytest.raises(CheckpointError, match=r"upop_compression\.pt is missing"):
        trainer(third, image_set, tmp_path, TrainerCallback(0.5)).train(resume_from_checkpoint=str(checkpoint))


def test_it_goes_on_in_the_middle_of_a_stage(image_set: Any, tmp_path: Path) -> None:
    """Eight steps search, in stages of two with `interval=2`; the checkpoint is of the third."""
    model, other = clip(), clip()
    settings: dict[str, Any] = {"ratio": 0.5, "search_steps": 8, "interval": 2}
    whole, resumed = TrainerCallback(**settings), TrainerCallback(**settings, teacher=True)
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 10, "optim": "adamw_torch"}
    trainer(model, image_set, tmp_path, whole, learning_rate=1e-2, **saving).train()
    state = torch.load(tmp_path / "checkpoint-3" / "upop_compression.pt", weights_only=True)
    assert state["pruner"]["steps_done"] == 3 and not state["pruner"]["stale"]
    second = trainer(other, image_set, tmp_path, resumed, learning_rate=1e-2, **saving)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert whole.compression is not None and resumed.compression is not None
    assert resumed.compression.plan() == whole.compression.plan()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-5, atol=1e-6)


WAYS: dict[str, dict[str, Any]] = {
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "not reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}


@pytest.mark.parametrize("way", mostly_slow(WAYS, "not reentrant"))
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # of the images' own embedding
def test_trainings_that_compute_activations_again_end_as_plain_ones(image_set: Any, tmp_path: Path, way: str) -> None:
    """A teacher sees no norm in a block that is reentrant: its first run has no gradients."""
    model, other = clip(), clip()
    settings: dict[str, Any] = {"teacher": False} if way == "reentrant" else {}
    plain, second = TrainerCallback(ratio=0.5, **settings), TrainerCallback(ratio=0.5, **settings)
    trainer(model, image_set, tmp_path / "plain", plain).train()
    trainer(other, image_set, tmp_path / "other", second, **WAYS[way]).train()
    assert plain.compression is not None and second.compression is not None
    assert second.compression.plan() == plain.compression.plan()
    assert [group.size for group in upop.find_groups(other)] == [
        len(each) for each in second.compression.plan().values()
    ]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-3, atol=1e-5)


class Sentences(Dataset[dict[str, list[int]]]):
    """Sixteen pairs of five words each."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        generator = torch.Generator().manual_seed(index)
        words, labels = torch.randint(2, 40, (2, 5), generator=generator).tolist()
        return {"input_ids": words, "attention_mask": [1] * 5, "labels": labels}


def test_a_translator_is_trained_by_its_own_trainer(tmp_path: Path) -> None:
    """With generation in its evaluation, before and after the cut."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=40,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    model = T5ForConditionalGeneration(config)
    dense = upop.count_parameters(model)
    callback = TrainerCallback(ratio=0.5)
    given = {**usual(tmp_path), "predict_with_generate": True, "generation_max_length": 6}
    one = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(**given, eval_strategy="steps", eval_steps=2),
        train_dataset=Sentences(),
        eval_dataset=Sentences(),
        callbacks=[callback],
    )
    one.train()
    assert callback.compression is not None and not callback.compression.searching
    assert upop.count_parameters(model) < dense
    assert any("decoder" in name for name in callback.compression.plan())
    assert len(one.predict(Sentences()).predictions) == 16
    one.save_model(str(tmp_path / "out"))
    again = T5ForConditionalGeneration.from_pretrained(tmp_path / "out")
    words = torch.tensor([Sentences()[0]["input_ids"]])
    assert torch.equal(again.generate(words, max_length=6), model.eval().generate(words, max_length=6))


def test_the_best_model_is_one_that_was_cut(image_set: Any, tmp_path: Path) -> None:
    model = clip()
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1}
    one = Trainer(
        model=model,
        args=arguments(tmp_path, **best, eval_steps=1),
        train_dataset=image_set,
        eval_dataset=image_set,
        callbacks=[callback := TrainerCallback(0.5)],
    )
    one.train()
    assert callback.compression is not None and one.state.best_global_step > 2
    assert [group.size for group in upop.find_groups(model)] == [
        len(each) for each in callback.compression.plan().values()
    ]


def test_a_loss_of_ones_own_takes_the_teacher_in(classifier: Any, image_set: Any, tmp_path: Path) -> None:
    def run(callback: TrainerCallback, loss_of: Any) -> None:
        Trainer(
            model=copy.deepcopy(classifier),
            args=arguments(tmp_path),
            train_dataset=image_set,
            compute_loss_func=loss_of,
            callbacks=[callback],
        ).train()

    def plain(outputs: Any, labels: Any, **_: Any) -> Any:
        return torch.nn.functional.cross_entropy(outputs.logits, labels)

    callback = TrainerCallback(0.5)
    with pytest.raises(StepError, match=r"compression\.loss\(task_loss\)"):
        run(callback, plain)
    callback.close()
    second = TrainerCallback(0.5)
    run(second, lambda *a, **k: second.compression.loss(plain(*a, **k)))  # type: ignore[union-attr]
    assert second.compression is not None and second.compression.steps_done == 6


def test_a_training_that_is_stopped_leaves_what_was_reached(classifier: Any, image_set: Any, tmp_path: Path) -> None:
    class Stop(Plain):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= 1

    dense = upop.count_parameters(classifier)
    with pytest.warns(UserWarning, match="after 1 of 2 steps"):
        trainer(classifier, image_set, tmp_path, Stop(), TrainerCallback(0.5)).train()
    assert 0.6 * dense < upop.count_parameters(classifier) < dense


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(SettingError, match="strictly between 0 and 1"):
        TrainerCallback(ratio=1.5)
