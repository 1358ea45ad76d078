"""The sentences of the generated pairs: true where they say so, and silent about it otherwise."""

import itertools
import re
from collections import Counter
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pixels import seen
from upop.data.text import clean_caption, swap_left_right
from upop.demo.claims import Pair
from upop.demo.counting import NUMBER_WORDS
from upop.demo.draw import COLOUR_VALUES, draw_scene
from upop.demo.nlvr import FRAMES, Example, Statement, sample_block, sample_split
from upop.demo.scenes import DIAMETER, MAX_SHAPES, Noun, Scene, sample_scene


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return list(sample_split(3, "train", 6000))


@pytest.fixture(scope="module")
def statements(examples: list[Example]) -> list[Statement]:
    return [statement for example in examples for statement in example.statements]


SIDES = {"left": 0, "right": 1}
AMOUNT = rf"({'|'.join(NUMBER_WORDS)})"
COLOURED = rf"(?:({'|'.join(COLOUR_VALUES)}) )?shapes?"
SAYS = [
    (
        rf"there (?:is|are) (?:exactly )?{AMOUNT} {COLOURED} in the (left|right) image",
        lambda see, n, c, s: count(see[SIDES[s]], c) == NUMBER_WORDS.index(n),
    ),
    (
        rf"the two images (?:show|contain exactly) {AMOUNT} {COLOURED} in total",
        lambda see, n, c: count(see[0], c) + count(see[1], c) == NUMBER_WORDS.index(n),
    ),
    (
        rf"there (?:is|are) at least {AMOUNT} {COLOURED} in the (left|right) image",
        lambda see, n, c, s: count(see[SIDES[s]], c) >= NUMBER_WORDS.index(n),
    ),
    (rf"neither image (?:shows|contains) a {COLOURED}", lambda see, c: not count(see[0] + see[1], c)),
    (rf"both images (?:show|contain) a {COLOURED}", lambda see, c: count(see[0], c) and count(see[1], c)),
    (
        rf"the (left|right) image (?:shows|has) (more|fewer) {COLOURED} than the (left|right) image",
        lambda see, s, word, c, t: (
            count(see[SIDES[s]], c) > count(see[SIDES[t]], c)
            if word == "more"
            else count(see[SIDES[s]], c) < count(see[SIDES[t]], c)
        ),
    ),
    (
        rf"the (left|right) image shows a {COLOURED} at the (top|bottom)",
        lambda see, s, c, end: (c, 0 if end == "top" else 2) in see[SIDES[s]],
    ),
    (
        rf"in the (left|right) image a {COLOURED} is (above|below) a {COLOURED}",
        lambda see, s, c, word, d: any(
            (x < y if word == "above" else x > y)
            for (one, x), (two, y) in itertools.product(see[SIDES[s]], repeat=2)
            if (one, two) == (c, d)
        ),
    ),
]


def count(areas: list[tuple[str, int]], colour: str | None) -> int:
    return sum(colour in (None, name) for name, _ in areas)


def rows_of_colours(scene: Scene) -> list[tuple[str, int]]:
    return [(area.colour, area.row) for area in seen(draw_scene(scene))]


def test_labels_hold_of_the_pixels(examples: list[Example]):
    """Reads sentences and images anew, sharing nothing with the code that made them."""
    checked: Counter = Counter()
    for example in examples[:500]:
        see = None
        for statement in example.statements:
            for place, (pattern, holds) in enumerate(SAYS):
                if found := re.fullmatch(pattern, statement.sentence):
                    see = see or [rows_of_colours(scene) for scene in (example.pair.left, example.pair.right)]
                    assert bool(holds(see, *found.groups())) is statement.label, statement.sentence
                    checked[place] += 1
    assert len(checked) == len(SAYS) and min(checked.values()) >= 3, checked


def test_every_label_is_what_the_claim_says(examples: list[Example]):
    for example in examples:
        for statement in example.statements:
            assert statement.claim.truth(example.pair) is statement.label
            assert statement.sentence in statement.claim.phrasings()


def test_sentences_stay_as_they_are_in_the_clean_up_and_are_short(statements: list[Statement]):
    for statement in statements:
        assert clean_caption(statement.sentence, 14) == statement.sentence


def opposite_label_exists(example: Example, statement: Statement) -> bool:
    """Whether swapping the words alone would ask something else of the pair."""
    return statement.claim.truth(example.pair.swapped()) is (not statement.label)


def test_swapping_images_and_words_keeps_the_label(examples: list[Example]):
    """The swapped sentence is one of the phrasings of a claim that is as true of the swapped pair."""
    matters = 0
    for example in examples[:600]:
        for statement in example.statements:
            swapped = swap_left_right(statement.sentence)
            assert swap_left_right(swapped) == statement.sentence
            claim = statement.claim
            if side := getattr(claim, "side", None):
                fields = {name: getattr(claim, name) for name in claim.__dataclass_fields__}
                fields["side"] = "right" if side == "left" else "left"
                claim = type(claim)(**fields)
            assert swapped in claim.phrasings()
            assert claim.truth(example.pair.swapped()) is statement.label
            matters += opposite_label_exists(example, statement)
    assert matters > 300  # it is no empty law: many labels turn when only the images are swapped


def test_true_and_false_are_as_frequent_in_every_frame_and_number_word(statements: list[Statement]):
    """Frames are used twice with opposite labels, so what they fix is balanced to the last record."""
    tally: dict[object, Counter] = {}
    for statement in statements:
        claim = statement.claim
        keys = [type(claim).__name__, (type(claim).__name__, getattr(claim, "number", None))]
        words = {*NUMBER_WORDS, "no", "not", "all"}
        keys += [word for word in statement.sentence.split() if word in words]
        for key in keys:
            tally.setdefault(key, Counter())[statement.label] += 1
    for key, labels in tally.items():
        assert labels[True] == labels[False], key


def features(sentences: list[str]) -> torch.Tensor:
    """Which words, and which pairs of neighbouring words, each sentence has."""
    bags = [{*(words := s.split()), *itertools.pairwise(words)} for s in sentences]
    common = [part for part, times in Counter(itertools.chain.from_iterable(bags)).items() if times >= 5]
    place = {part: number for number, part in enumerate(common)}
    table = torch.zeros(len(bags), len(place))
    for row, bag in enumerate(bags):
        table[row, [place[part] for part in bag if part in place]] = 1.0
    return table


def test_the_text_alone_does_not_give_the_label_away(statements: list[Statement]):
    """A logistic regression on words and word pairs of 4000 sentences stays at chance on 2000 others."""
    table = features([statement.sentence for statement in statements])
    labels = torch.tensor([float(statement.label) for statement in statements])
    weights = torch.zeros(table.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = table[:4000] @ weights[1:] + weights[0]
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels[:4000])
        value = value + 3e-4 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        right = ((table[4000:] @ weights[1:] + weights[0] > 0) == labels[4000:].bool()).float().mean().item()
    assert 0.44 < right < 0.56


def test_no_word_is_true_more_often_than_false(statements: list[Statement]):
    true: Counter = Counter()
    times: Counter = Counter()
    for statement in statements:
        for word in set(statement.sentence.split()):
            times[word] += 1
            true[word] += statement.label
    for word, number in times.items():
        # Four and a half standard deviations of a fair coin: one false alarm in 2000 vocabularies.
        assert abs(true[word] / number - 0.5) < 4.5 * 0.5 / number**0.5, word


@settings(deadline=None)  # how long a draw takes depends on the machine
@given(st.integers(0, 10**9))
def test_a_block_is_two_pairs_with_opposite_labels_of_the_same_kind_of_claim(seed: int):
    first, second = sample_block(Random(seed))
    assert first.pair.content != second.pair.content
    for one, two in zip(first.statements, second.statements, strict=True):
        assert type(one.claim) is type(two.claim)
        assert one.label is not two.label


@settings(deadline=None)  # how long a draw takes depends on the machine
@given(st.integers(0, 10**9))
def test_shapes_never_overlap_nor_leave_the_image(seed: int):
    shapes = sample_scene(Random(seed)).shapes
    assert 1 <= len(shapes) <= MAX_SHAPES
    for shape in shapes:
        assert all(shape.radius <= part <= 1 - shape.radius for part in shape.centre)
    for one, two in itertools.combinations(shapes, 2):
        gaps = [abs(p - q) - one.radius - two.radius for p, q in zip(one.centre, two.centre, strict=True)]
        assert max(gaps) > 0
        if one.is_above(two):
            assert two.centre[1] - one.centre[1] > DIAMETER["large"]


def test_taken_pairs_do_not_come_up_again():
    first, second = sample_block(Random(5))
    taken = {first.pair.content, second.pair.content}
    again = sample_block(Random(5), taken)
    assert not taken & {example.pair.content for example in again}


def test_every_frame_can_be_asked_both_ways():
    """No frame is dead weight: each yields true and false statements on ordinary pairs."""
    rng = Random(0)
    found = {number: set() for number in range(len(FRAMES))}
    for _ in range(500):
        pair = Pair(sample_scene(rng), sample_scene(rng))
        for number, frame in enumerate(FRAMES):
            found[number].add(frame.propose(rng, pair).truth(pair))
    assert all({True, False} <= truths for truths in found.values())


def test_nouns_read_well():
    assert Noun("circle", "red", "large").plural == "large red circles"
    assert Noun(colour="blue").singular == "blue shape"
    assert Noun().plural == "shapes"
