"""Questions about generated images: answered by the pixels, and not by their own words."""

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from random import Random

import pytest

from pixels import Seen, seen
from upop.demo import questions as q
from upop.demo.draw import draw_scene
from upop.demo.scenes import COLOURS, GRID, KINDS, SIZES, Noun, Scene, Shape
from upop.demo.vqa import ANNOTATORS, FRAMES, SHARES, AnnotatedQuestion, Example, annotate, answer_list, sample_examples


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return list(itertools.islice(sample_examples(1, "train"), 1500))


@pytest.fixture(scope="module")
def asked(examples: list[Example]) -> list[AnnotatedQuestion]:
    return [one for example in examples for one in example.questions]


THINGS = rf"((?:(?:{'|'.join((*SIZES, *COLOURS))}) )*(?:{'|'.join((*KINDS, 'shape'))}))s?"
ROWS = {"at the top": 0, "in the middle": 1, "at the bottom": 2}
AT = rf"({'|'.join(ROWS)})"


def those(areas: list[Seen], words: str) -> list[Seen]:
    wanted = set(words.split()) - {"shape"}
    return [area for area in areas if wanted <= set(area)]


def one(areas: list[Seen]) -> Seen:
    (area,) = areas
    return area


def yes(truth: bool) -> str:
    return "yes" if truth else "no"


SAYS: list[tuple[str, Callable[..., str]]] = [
    (rf"is there a {THINGS}\?", lambda see, n: yes(bool(those(see, n)))),
    (rf"is there a {THINGS} {AT}\?", lambda see, n, at: yes(any(a.row == ROWS[at] for a in those(see, n)))),
    (rf"how many {THINGS} are there\?", lambda see, n: str(len(those(see, n)))),
    (rf"how many shapes are {AT}\?", lambda see, at: str(sum(a.row == ROWS[at] for a in see))),
    (rf"what color is the {THINGS}\?", lambda see, n: one(those(see, n)).colour),
    (rf"what is the {THINGS}\?", lambda see, n: one(those(see, n)).kind),
    (rf"what size is the {THINGS}\?", lambda see, n: one(those(see, n)).size),
    (rf"where is the {THINGS}\?", lambda see, n: ("top", "middle", "bottom")[one(those(see, n)).row]),
    (rf"what is {AT}\?", lambda see, at: "{0.colour} {0.kind}".format(one([a for a in see if a.row == ROWS[at]]))),
    (rf"is the {THINGS} above the {THINGS}\?", lambda see, n, m: yes(one(those(see, n)).row < one(those(see, m)).row)),
    (
        rf"are there (more|fewer) {THINGS} than {THINGS}\?",
        lambda see, word, n, m: yes((len(those(see, n)) - len(those(see, m))) * (1 if word == "more" else -1) > 0),
    ),
    (r"are all shapes (\w+?)s?\?", lambda see, word: yes(len(those(see, word)) == len(see))),
    (
        rf"is the {THINGS} (?:a )?({'|'.join((*KINDS, *COLOURS, *SIZES))})\?",
        lambda see, n, w: yes(w in one(those(see, n))),
    ),
]


def test_answers_hold_of_the_pixels(examples: list[Example]):
    """Reads questions and images anew, sharing nothing with the code that made them."""
    checked: Counter = Counter()
    for example in examples[:250]:
        see = seen(draw_scene(example.scene, 128))
        for question in example.questions:
            for pattern, answer in SAYS:
                if found := re.fullmatch(pattern, question.text):
                    assert answer(see, *found.groups()) == question.answer, question.text
                    checked[pattern] += 1
    assert len(checked) == len(SAYS) and min(checked.values()) >= 3, checked


def test_every_answer_is_what_the_question_says(examples: list[Example]):
    for example in examples:
        assert len({question.frame.family for question in example.questions}) == 4
        for question in example.questions:
            assert question.question.answer(example.scene) == question.answer
            assert question.text in question.question.phrasings()
            assert question.answer in question.frame.answers


def test_every_answer_of_a_frame_comes_up_equally_often(asked: list[AnnotatedQuestion]):
    tally: dict[int, Counter] = defaultdict(Counter)
    for question in asked:
        tally[FRAMES.index(question.frame)][question.answer] += 1
    assert len(tally) == len(FRAMES)
    for number, counts in tally.items():
        every = [counts[answer] for answer in FRAMES[number].answers]
        assert max(every) - min(every) <= 1


def test_the_question_alone_does_not_give_the_answer_away(asked: list[AnnotatedQuestion]):
    """The most frequent answer to the same words elsewhere is right as often as a guess within the frame."""
    half = len(asked) * 2 // 3
    answers: dict[str, Counter] = defaultdict(Counter)
    for question in asked[:half]:
        answers[question.text][question.answer] += 1
    known = [question for question in asked[half:] if question.text in answers]
    right = sum(answers[question.text].most_common(1)[0][0] == question.answer for question in known) / len(known)
    guessed = sum(1 / len(question.frame.answers) for question in known) / len(known)
    assert len(known) > 1000
    assert right < guessed + 0.045  # more than three standard deviations


def test_all_three_types_of_answers_come_up(asked: list[AnnotatedQuestion]):
    types = Counter(question.frame.answer_type for question in asked)
    assert {name: round(number / len(asked), 1) for name, number in types.items()} == {
        "yes/no": 0.5,
        "other": 0.3,
        "number": 0.2,
    }


def test_annotators_write_the_right_answer_in_other_words_or_a_wrong_one():
    rng = Random(0)
    listed = answer_list()
    assert len(set(listed)) == len(listed)
    for frame in FRAMES:
        for answer in frame.answers:
            written = [annotate(rng, frame, answer) for _ in range(60)]
            assert all(len(each) == ANNOTATORS and each.count(answer) >= 7 for each in written)
            assert {word for each in written for word in each} <= set(listed)
            assert len({word for each in written for word in each}) > 1


def test_no_image_of_one_split_is_in_another_nor_its_mirror_image():
    shown = {}
    for split in SHARES:
        scenes = [example.scene.content for example in itertools.islice(sample_examples(1, split), 400)]
        mirrored = [tuple(sorted((*shape[:4], GRID - 1 - shape[4]) for shape in scene)) for scene in scenes]
        shown[split] = {*scenes, *mirrored}
    for first, second in itertools.combinations(SHARES, 2):
        assert not shown[first] & shown[second]


CIRCLE, SQUARE = Shape("circle", "red", "small", 0, 0), Shape("square", "blue", "large", 2, 1)


@pytest.mark.parametrize(
    ("question", "shapes", "answer"),
    [
        (q.IsThere(Noun("circle")), [CIRCLE], "yes"),
        (q.IsThere(Noun("square")), [CIRCLE], "no"),
        (q.IsThere(Noun("circle"), 1), [CIRCLE], "no"),
        (q.IsThere(Noun("square"), 1), [CIRCLE], None),
        (q.IsAbove(Noun("circle"), Noun("square")), [CIRCLE, SQUARE], "yes"),
        (q.IsAbove(Noun("circle"), Noun("square"), below=True), [CIRCLE, SQUARE], "no"),
        (q.IsAbove(Noun("circle"), Noun("square")), [CIRCLE, CIRCLE, SQUARE], None),
        (q.IsAbove(Noun("circle"), Noun("circle")), [CIRCLE], None),
        (q.AreThereMore(Noun("circle"), Noun("square")), [CIRCLE, SQUARE], "no"),
        (q.AreThereMore(Noun("circle"), Noun("square")), [CIRCLE, CIRCLE, SQUARE], "yes"),
        (q.AreThereMore(Noun("triangle"), Noun(colour="green")), [CIRCLE], None),
        (q.AreAll("red"), [CIRCLE, SQUARE], "no"),
        (q.AreAll("red"), [CIRCLE, CIRCLE], "yes"),
        (q.AreAll("red"), [CIRCLE], None),
        (q.AreAll("green"), [CIRCLE, SQUARE], None),
        (q.IsThe(Noun("circle"), "red"), [CIRCLE, SQUARE], "yes"),
        (q.IsThe(Noun("circle"), "large"), [CIRCLE, SQUARE], "no"),
        (q.IsThe(Noun("circle"), "red"), [CIRCLE, CIRCLE], None),
        (q.HowMany(Noun()), [CIRCLE, SQUARE], "2"),
        (q.HowMany(Noun(), 2), [CIRCLE, SQUARE], "1"),
        (q.HowMany(Noun("triangle")), [CIRCLE, SQUARE], "0"),
        (q.WhatIs(Noun("circle"), "row"), [CIRCLE, SQUARE], "top"),
        (q.WhatIs(Noun("circle"), "colour"), [CIRCLE, CIRCLE], None),
        (q.WhatIsAt(2), [CIRCLE, SQUARE], "blue square"),
        (q.WhatIsAt(1), [CIRCLE, SQUARE], None),
    ],
)
def test_answers_by_hand(question: q.Question, shapes: list[Shape], answer: str | None):
    assert question.answer(Scene(tuple(shapes))) == answer
    assert all(text.endswith("?") for text in question.phrasings())
