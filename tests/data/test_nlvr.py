"""NLVR2 samples: what a good file gives, and what every way of being broken says."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from together import FORKS
from upop.data.nlvr import NlvrDataset, collate_nlvr
from upop.data.tokenizer import load_tokenizer
from upop.data.transforms import eval_transform
from upop.demo import Summary
from upop.errors import DataError

SAMPLE = {"sentence": "The LEFT image is red.", "label": "True", "images": ["a/red.png", "blue.png"]}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / "a" / "red.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "images" / "blue.png")
    return tmp_path / "images"


def dataset(root: Path, samples: object, *, swap: bool = False) -> NlvrDataset:
    file = root.parent / "nlvr.json"
    file.write_text(samples if isinstance(samples, str) else json.dumps(samples))
    return NlvrDataset(file, root, eval_transform(8), swap=swap)


def refusal(root: Path, samples: object) -> str:
    with pytest.raises(DataError) as caught:
        dataset(root, samples)
    assert "nlvr.json" in str(caught.value)
    return str(caught.value)


def changed(**fields: object) -> list[dict]:
    """Eighteen samples, the last of them with these fields."""
    return [SAMPLE] * 17 + [{**SAMPLE, **fields}]


def is_red(image: torch.Tensor) -> bool:
    return bool(image[0].mean() > image[2].mean())


def test_a_sample_gives_two_images_a_clean_sentence_and_a_label(root: Path):
    data = dataset(root, [SAMPLE, {**SAMPLE, "label": "False", "images": ["blue.png", "a/red.png"]}])
    assert len(data) == 2
    item = data[0]
    assert (item["sentence"], item["label"], data[1]["label"]) == ("the left image is red", 1, 0)
    assert is_red(item["image0"]) and not is_red(item["image1"])
    assert item["image0"].shape == (3, 8, 8)
    assert is_red(data[-1]["image1"])
    with pytest.raises(IndexError):
        data[2]


def test_fields_that_nobody_asked_for_are_no_problem(root: Path):
    assert len(dataset(root, [{**SAMPLE, "identifier": "dev-1", "synset": 3}])) == 1


def test_a_byte_order_mark_is_no_problem(root: Path):
    assert len(dataset(root, "\ufeff" + json.dumps([SAMPLE]))) == 1


def test_swapping_keeps_the_statement_about_the_images(root: Path):
    """The sentence says which image is red, so it stays true however the two images lie."""
    data = dataset(root, [SAMPLE], swap=True)
    torch.manual_seed(0)
    swapped = 0
    for _ in range(200):
        item = data[0]
        assert is_red(item["image0"]) is (item["sentence"] == "the left image is red")
        assert is_red(item["image1"]) is (item["sentence"] == "the right image is red")
        assert item["label"] == 1
        swapped += is_red(item["image1"])
    assert 70 < swapped < 130


def test_without_swap_nothing_is_drawn(root: Path):
    data = dataset(root, [SAMPLE])
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert all(is_red(data[0]["image0"]) for _ in range(20))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_missing_file_is_named_with_a_hint(root: Path):
    dataset(root, [SAMPLE])
    with pytest.raises(DataError, match=r"nlvrr\.json does not exist \(did you mean 'nlvr\.json'\?\)"):
        NlvrDataset(root.parent / "nlvrr.json", root, eval_transform(8), swap=False)
    with pytest.raises(DataError, match=r"does not exist, nor does the folder .*annotations"):
        NlvrDataset(root.parent / "annotations" / "nlvr.json", root, eval_transform(8), swap=False)
    with pytest.raises(DataError, match="cannot be read"):
        NlvrDataset(root, root, eval_transform(8), swap=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ('[{"sentence": "a', "is not JSON.*truncated"),
        ("[" * 100_000, "is not JSON"),
        ("{}", r"must hold a list of samples, not \{\}"),
        ("null", "must hold a list of samples, not null"),
        ("[]", "holds no samples"),
        ("[1]", "sample 0: must be an object with named fields, not 1"),
    ],
)
def test_a_file_that_is_no_list_of_samples_is_refused(root: Path, content: str, message: str):
    with pytest.raises(DataError, match=message):
        dataset(root, content)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sentence": 5}, "sample 17: 'sentence' must be a non-empty text, not 5"),
        ({"sentence": " "}, "sample 17: 'sentence' must be a non-empty text"),
        ({"sentence": "..."}, "sample 17: 'sentence' holds no words: '...'"),
        ({"label": True}, 'sample 17: \'label\' must be the text "False" or "True", not true'),
        ({"label": "true"}, "not \"true\" (did you mean 'True'?)"),
        ({"label": 1}, "sample 17: 'label' must be"),
        ({"label": None}, "not null"),
        ({"images": "a/red.png"}, "sample 17: 'images' must be a list of 2 texts, not \"a/red.png\""),
        ({"images": ["blue.png"]}, "sample 17: 'images' must be a list of 2 texts"),
        ({"images": ["blue.png"] * 3}, "sample 17: 'images' must be a list of 2 texts"),
        ({"images": ["blue.png", 3]}, "but holds 3"),
        ({"images": ["blue.png", ""]}, 'but holds ""'),
        ({"images": ["blue.png", "nowhere.png"]}, "sample 17: the image 'nowhere.png' does not exist"),
        ({"images": ["blue.png", "b/c/red.png"]}, "sample 17: the image 'b/c/red.png' does not exist"),
        ({"images": ["blue.png", "nul\0l.png"]}, "sample 17: the image"),
        ({"images": ["blue.png", "\ud800.png"]}, "sample 17: 'images' must be a list of 2 texts"),
    ],
)
def test_a_broken_field_is_named_with_its_sample(root: Path, fields: dict, message: str):
    assert message in refusal(root, changed(**fields))


@pytest.mark.parametrize("name", ["sentence", "label", "images"])
def test_a_missing_field_is_named_with_its_sample(root: Path, name: str):
    sample = {(key + "s" if key == name else key): value for key, value in SAMPLE.items()}
    message = refusal(root, [SAMPLE, sample])
    assert f"sample 1: the field '{name}' is missing (did you mean '{name}s'?)" in message


def test_missing_images_are_counted(root: Path):
    names = [f"{number}.png" for number in range(5)]
    message = refusal(root, [SAMPLE, *({**SAMPLE, "images": [name, name]} for name in names)])
    assert "sample 1: the image '0.png'" in message and "5 images of this file are missing in all" in message


def test_a_wrong_image_root_is_said_to_be_no_folder(root: Path):
    dataset(root, [SAMPLE])
    with pytest.raises(DataError, match=r"image root .*pictures is not a folder"):
        NlvrDataset(root.parent / "nlvr.json", root.parent / "pictures", eval_transform(8), swap=False)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize("spoil", [cut, lambda content: b"", lambda content: b"<html>404</html>"])
def test_an_image_that_cannot_be_read_is_named_with_its_sample(generated: Summary, tmp_path: Path, spoil):
    samples = json.loads((generated.annotation / "nlvr_dev.json").read_text())[:8]
    broken = samples[4]["images"][1]
    for name in {name for sample in samples for name in sample["images"]}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(generated.image_root / name, tmp_path / name)
    (tmp_path / broken).write_bytes(spoil((tmp_path / broken).read_bytes()))
    (tmp_path / "dev.json").write_text(json.dumps(samples))
    data = NlvrDataset(tmp_path / "dev.json", tmp_path, eval_transform(64), swap=False)
    assert data[3]
    for index in (4, 4 - len(data)):
        with pytest.raises(DataError, match=rf"dev\.json, sample 4: the image .*{Path(broken).name} cannot be read"):
            data[index]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_images_of_any_mode_become_rgb(root: Path, mode: str):
    name = "other.tif" if mode == "CMYK" else "other.png"
    Image.new("RGB", (9, 7), "white").convert(mode).save(root / name)
    assert dataset(root, [{**SAMPLE, "images": [name, name]}])[0]["image0"].shape == (3, 8, 8)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(name=st.sampled_from([None, *SAMPLE]), value=JSON)
def test_any_json_is_read_or_refused_by_name(root: Path, name: str | None, value: object):
    samples = value if name is None else [{**copy.deepcopy(SAMPLE), name: value}]
    try:
        data = dataset(root, json.dumps(samples))
    except DataError as error:
        assert "nlvr.json" in str(error)
    else:
        assert len(data) == len(samples)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.binary(max_size=60))
def test_any_bytes_are_refused(root: Path, content: bytes):
    file = root.parent / "nlvr.json"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"nlvr\.json"):
        NlvrDataset(file, root, eval_transform(8), swap=False)


@pytest.fixture(scope="module")
def tokenizer(generated: Summary):
    return load_tokenizer(generated.tokenizer)


def test_a_batch_has_all_left_images_first_and_padded_sentences(generated: Summary, tokenizer):
    data = NlvrDataset(generated.annotation / "nlvr_dev.json", generated.image_root, eval_transform(64), swap=False)
    items = [data[index] for index in range(0, 20, 4)]
    batch = collate_nlvr(tokenizer)(items)
    assert batch["images"].shape == (10, 3, 64, 64)
    for row, item in enumerate(items):
        assert torch.equal(batch["images"][row], item["image0"])
        assert torch.equal(batch["images"][5 + row], item["image1"])
        length = int(batch["attention_mask"][row].sum())
        assert tokenizer.decode(batch["input_ids"][row, 1 : length - 1]) == item["sentence"]
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1]
    assert (batch["input_ids"][:, 0] == tokenizer.cls_token_id).all()
    assert batch["labels"].tolist() == [item["label"] for item in items]
    assert batch["labels"].dtype == torch.int64


def test_sentences_are_cut_to_the_number_of_tokens(generated: Summary, tokenizer):
    data = NlvrDataset(generated.annotation / "nlvr_dev.json", generated.image_root, eval_transform(64), swap=False)
    assert collate_nlvr(tokenizer, 5)([data[0], data[1]])["input_ids"].shape == (2, 5)


def test_the_same_seed_swaps_the_same_samples(generated: Summary, tokenizer):
    data = NlvrDataset(generated.annotation / "nlvr_dev.json", generated.image_root, eval_transform(16), swap=True)
    epochs = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        epochs.append([data[index]["sentence"] for index in range(40)])
    assert epochs[0] == epochs[1] != epochs[2]


@pytest.mark.slow
def test_a_worker_process_started_afresh_gives_the_same_batches(generated: Summary, tokenizer):
    """Workers that are not forked, the only kind on macOS and Windows, get data set and collate function by pickle."""
    data = NlvrDataset(generated.annotation / "nlvr_dev.json", generated.image_root, eval_transform(16), swap=False)
    collate = collate_nlvr(tokenizer)
    here = DataLoader(data, batch_size=100, collate_fn=collate)
    there = DataLoader(data, batch_size=100, collate_fn=collate, num_workers=1, multiprocessing_context=FORKS)
    for one, two in zip(here, there, strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)
