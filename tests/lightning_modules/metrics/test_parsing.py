"""Which letter, or which of yes and no, a generated text means."""

import pytest

from lightning_modules.metrics.answers.parse import parse_letter, parse_yes_no


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("(b)", "B"),
        ("B.", "B"),
        ("**B**", "B"),
        ("[C]", "C"),
        (" B\n", "B"),
        ("b) red", "B"),
        ("(B) a bike", "B"),
        ("A. a bike", "A"),
        ("B: red", "B"),
        ("B red", "B"),
        ("B, because it is red", "B"),
        ("Answer: B", "B"),
        ("answer: (B)", "B"),
        ("The answer is B", "B"),
        ("The answer is A.", "A"),
        ("The answer is A because the car stops.", "A"),
        ("The best answer is (C) red.", "C"),
        ("The correct answer is **D**", "D"),
        ("The best option is B", "B"),  # a published list of prefixes lacks a comma at this one
        ("The correct option is: B", "B"),
        ("The correct choice is\nB", "B"),
        ("Best option: B", "B"),
        ("I choose option C.", "C"),
        ("It is B.", "B"),
        ("The red one (B).", "B"),
        ("Option A is wrong. The answer is B.", "B"),
        ("The answer is not A, it is B", "B"),
        # "A" and "I" are words, too
        ("A bike", None),
        ("A", "A"),
        ("A man rides. The answer is C.", "C"),
        ("The answer is a bike", None),
        ("The answer is A bike", None),
        ("It is a car", None),
        ("I do not know", None),
        ("I'd say a bike", None),
        # nothing there
        ("", None),
        ("red", None),
        ("Because", None),
        ("B-roll of a car", None),
        ("Bike", None),
        ("Don't know", None),
        # no such option
        ("E", None),
        ("The answer is F.", None),
        # more than one
        ("A. red\nB. blue", None),
        ("The answer is A. No, the answer is B.", None),
        ("(A) or (B)", None),
        ("A, B", None),
        ("B and C are right", None),
    ],
)
def test_letters(text, letter):
    assert parse_letter(text, 4) == letter


def test_the_number_of_options_decides_which_letters_there_are():
    assert parse_letter("E", 5) == "E"
    assert parse_letter("C", 2) is None
    assert parse_letter("I", 9) == "I"
    assert parse_letter("I think so", 9) is None


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("yes", True),
        ("Yes.", True),
        ("YES, it does", True),
        ("**No**", False),
        ("no", False),
        ("No, yes would be wrong", False),
        ("Answer: yes", True),
        ("There is no bike in the video.", False),
        ("The video does show it, so yes.", True),
        ("It could be yes or no", None),
        ("", None),
        ("The man knows it", None),
        ("Yesterday", None),
        ("Not at all", None),
    ],
)
def test_yes_and_no(text, meant):
    assert parse_yes_no(text) is meant
