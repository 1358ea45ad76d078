"""Captions of generated images: true of the pixels, read back, and of their own image alone where that matters."""

import itertools
from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from pixels import Seen, seen
from tiers import mostly_slow
from upop.demo.caption_files import (
    CAPTION_FLAVOUR,
    FLICKR_FLAVOUR,
    RETRIEVAL_FLAVOUR,
    Captioned,
    sample_captioned,
)
from upop.demo.captions import MAX_WORDS, describe
from upop.demo.draw import COLOUR_VALUES, draw_scene
from upop.demo.reading import describes, read_caption, read_scene
from upop.demo.scenes import GRID, Scene, Shape
from upop.errors import DataError

SPLITS = ("train", "val", "test")


def sample(flavour, split: str, number: int, seed: int = 2) -> list[Captioned]:
    return list(itertools.islice(sample_captioned(flavour, seed, split), number))


@pytest.fixture(scope="module")
def examples() -> list[Captioned]:
    return sample(CAPTION_FLAVOUR, "train", 1000)


def looks(scene: Scene) -> Counter:
    return Counter(Seen(shape.kind, shape.colour, shape.size, shape.row) for shape in scene.shapes)


def test_what_the_captions_tell_is_what_the_pixels_show(examples: list[Captioned]):
    """Through the words alone: the image is looked at, and the captions are read, by nothing that made them."""
    for example in examples[:60]:
        texts = [text for text, _ in example.captions]
        areas = seen(draw_scene(example.scene, 128))
        assert looks(read_scene(texts)) == Counter(areas)
        scene = Scene(tuple(Shape(area.kind, area.colour, area.size, area.row, 0) for area in areas))
        for text in texts:
            described = read_caption(text)
            assert described is not None and described.fits(scene) and described.number == len(areas), text


@pytest.mark.parametrize("flavour", [CAPTION_FLAVOUR, RETRIEVAL_FLAVOUR, FLICKR_FLAVOUR], ids=lambda f: f.task)
def test_every_caption_is_read_back_as_what_it_tells(flavour):
    for example in sample(flavour, "train", 600):
        assert len({text for text, _ in example.captions}) == 5
        for text, caption in example.captions:
            assert read_caption(text) == caption
            assert caption.fits(example.scene)
            assert caption.number == len(example.scene.shapes)
            assert len(text.split()) <= MAX_WORDS


def test_every_reference_describes_its_image_and_a_changed_colour_does_not(examples: list[Captioned]):
    rng = Random(0)
    for example in examples[:300]:
        texts = [text for text, _ in example.captions]
        for text in texts:
            assert describes(text, texts)
            words = text.split()
            place = rng.choice([place for place, word in enumerate(words) if word in COLOUR_VALUES])
            words[place] = rng.choice([colour for colour in COLOUR_VALUES if colour != words[place]])
            assert not describes(" ".join(words), texts)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("a red circle above two blue squares", True),
        ("two blue squares under a large red circle", True),
        ("three shapes, two blue squares and a circle", False),  # the circle's colour is not told
        ("there are two blue squares and a red circle", True),
        ("a red circle , a small blue square and a small blue square", True),
        ("a red circle in the top row and two small blue squares in the bottom row", False),  # one is in the middle
        ("a red circle below two blue squares", False),
        ("a red circle and a blue square", False),  # one is not told
        ("a red circle and three blue squares", False),
        ("a small red circle and two blue squares", False),
        ("four shapes, two blue squares and a red circle", False),
        ("two blue square and a red circle", False),
        ("a red circle and two blue squares and", False),
        ("a red circle a blue square a blue square", False),
        ("a dog and two blue squares", False),
        ("", False),
    ],
)
def test_what_describes_an_image(text: str, right: bool):
    references = [
        "a red circle with two blue squares",
        "a large red circle at the top, a small blue square in the middle and a small blue square at the bottom",
    ]
    assert describes(text, references) is right


def test_captions_that_tell_too_little_are_no_references():
    with pytest.raises(DataError, match=r"None of the captions has size.*upop data shapes --task caption"):
        describes("a red circle", ["a red circle", "a large red circle", "a red circle at the top", "a man on a horse"])


def test_an_order_holds_for_all_shapes_of_both_groups():
    high, low, lowest = (Shape("circle", "red", "small", row, 0) for row in range(GRID))
    square = Shape("square", "blue", "large", 1, 1)
    caption = read_caption("two red circles above a blue square")
    assert not caption.fits(Scene((high, low, square)))
    assert not caption.fits(Scene((high, lowest, square)))
    assert caption.fits(Scene((high, replace(high, column=2), square)))
    assert read_caption("a red circle above a blue square above a red circle").fits(Scene((lowest, square, high)))


def test_places_and_sizes_are_told_when_asked_for():
    scene = Scene((Shape("circle", "red", "small", 0, 0), Shape("square", "blue", "large", 2, 1)))
    assert set(describe(Random(0), scene, sizes=False, places="rows").phrasings()) <= {
        f"{start}a {first} {places[first]} and a {second} {places[second]}"
        for start in ("", "there is ")
        for first, second in itertools.permutations(("red circle", "blue square"))
        for places in (
            {"red circle": "at the top", "blue square": "at the bottom"},
            {"red circle": "in the top row", "blue square": "in the bottom row"},
        )
    }
    for seed in range(20):
        for text in describe(Random(seed), scene, sizes=True, places="order").phrasings():
            assert "small red circle" in text and "large blue square" in text
            assert {"above", "over", "below", "under"} & set(text.split())


@pytest.mark.parametrize(
    "flavour", mostly_slow([RETRIEVAL_FLAVOUR, FLICKR_FLAVOUR], RETRIEVAL_FLAVOUR), ids=lambda f: f.task
)
@pytest.mark.parametrize("split", mostly_slow(["val", "test"], "test"))
def test_every_caption_fits_its_own_image_only(flavour, split: str):
    found = sample(flavour, split, 120)
    for one, two in itertools.permutations(found, 2):
        for text, caption in one.captions:
            assert not caption.fits(two.scene), text


def seen_twice(captioned: list[Captioned]) -> int:
    """Texts that several images have."""
    texts = Counter(text for example in captioned for text in {text for text, _ in example.captions})
    return sum(number > 1 for number in texts.values())


def test_the_law_of_one_image_is_no_accident():
    """Images drawn alike without it share captions."""
    assert seen_twice(sample(RETRIEVAL_FLAVOUR, "test", 300)) == 0
    assert seen_twice(sample(replace(RETRIEVAL_FLAVOUR, apart=False), "test", 300)) > 20


@pytest.mark.parametrize(
    "flavour",
    mostly_slow([CAPTION_FLAVOUR, RETRIEVAL_FLAVOUR, FLICKR_FLAVOUR], CAPTION_FLAVOUR),
    ids=lambda f: f.task,
)
def test_no_image_of_one_split_is_in_another_nor_its_mirror_image(flavour):
    shown = {}
    for split in SPLITS:
        scenes = [example.scene.content for example in sample(flavour, split, 500)]
        mirrored = [tuple(sorted((*shape[:4], GRID - 1 - shape[4]) for shape in scene)) for scene in scenes]
        shown[split] = {*scenes, *mirrored}
    for one, two in itertools.combinations(SPLITS, 2):
        assert not shown[one] & shown[two]


def test_captions_vary_and_no_attribute_is_favoured(examples: list[Captioned]):
    texts = [text for example in examples for text, _ in example.captions]
    starts = Counter(" ".join(text.split()[:2]) for text in texts)
    assert len(starts) > 15
    for words in (("circle", "square", "triangle"), tuple(COLOUR_VALUES), ("top", "middle", "bottom")):
        counts = [
            sum(len([w for w in text.replace(",", "").split() if w in (word, f"{word}s")]) for text in texts)
            for word in words
        ]
        assert max(counts) < 1.15 * min(counts), dict(zip(words, counts, strict=True))
    shapes = Counter(len(example.scene.shapes) for example in examples)
    assert set(shapes) == {1, 2, 3} and min(shapes.values()) > 80
