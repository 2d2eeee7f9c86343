"""Every letter in every form that models write, and words that are no letter."""

from string import ascii_uppercase

import pytest

from lightning_modules.metrics.answers.parse import parse_letter, parse_yes_no

FORMS = [
    "{}",
    " {}\n",
    "{}.",
    "{})",
    "({})",
    "({}).",
    "[{}]",
    "**{}**",
    "`{}`",
    '"{}"',
    "“{}”",
    "${}$",
    "\\boxed{{{}}}",
    "The answer is $\\boxed{{\\text{{{}}}}}$.",
    "<answer>{}</answer>",
    "<think>It is red.</think>\n<answer>{}</answer>",
    "{}\nThe car is red.",
    "{}\n\nBecause the car is red.",
    "**{}**\nThe car is red.",
    "{}. red",
    "{}) red",
    "({}) red",
    "[{}] a red car",
    "**{}.** red",
    "{}: red",
    "{} - red",
    "{} – red",  # noqa: RUF001
    "{} — red",
    "{} -> red",
    "{}, because it is red",
    "{} because it is red",
    "{} is correct.",
    "({}) is the right one",
    "Answer: {}",
    "Answer: {}.",
    "Answer: {}\n\nBecause the car is red.",
    "Answer: ({}) red",
    "**Answer:** {}",
    "**Answer: {}**\n\nThe car is red.",
    "Final answer: {}",
    "The answer is {}",
    "The answer is {}.",
    "The answer is {} because the car stops.",
    "The answer is ({}) a red car.",
    'The answer is "{}".',
    "The answer is: {}",
    "The correct answer is **{}**",
    "The answer is option {}.",
    "The answer would be {}.",
    "The best option is {}",
    "The correct option is: {}",
    "The correct choice is\n{}",
    "Best option: {}",
    "Option {} is correct.",
    "option {}",
    "Option {}: red",
    "Option ({}) red",
    "Option {}\nThe car is red.",
    "I choose option {}.",
    "I would go with choice {}, because it is red",
    "It is {}.",
    "It's red, so the letter is {}.",
    "The car is red, so it is ({}).",
    "It's {}.",
    "It’s {}, because the car stops.",  # noqa: RUF001
    "I choose {}.",
    "I would go with {}.",
    "I'd say {}.",
    "I’d pick ({}).",  # noqa: RUF001
    "I select {}: red",
    "Therefore, {}.",
    "The car is red, thus {}.",
    "The car is red. So, {}.",
    "The answer is likely {}.",
    "The answer is most likely ({}).",
    "The correct answer is probably {}, because it is red",
    "The answer is clearly option {}",
    "The answer seems to be {}.",
    "答案：{}",  # noqa: RUF001
    "答案是{}。",
    "答案：（{}）",  # noqa: RUF001
    "{} (red)",
    "{} (the red car).",
    "{} (correct)",
    "{} (red) because it moves",
    "Answer: {} (red)",
    "The answer is {} (red car).",
    "It is {} (red), because it moves.",
    "Option {} (red)",
    'choice {} "red"',
    "{} it is",
    "{} best describes it",
    "{} best matches the video",
    "{} fits best",
    "{} has to be it",
    "{} looks right",
    "{} appears correct",
    "{} due to the red car",
    "{} according to the video",
    "{} and not Q",
    "{} not option Q",
    "{} rather than a bike",
    "{} instead of a bike",
    "The answer is {} which is red",
    "The answer is {} and not a bike",
]
OF_CAPITALS = [
    '{} "red"',
    "{} 'red'",
    "{} 'the man's car'",
    "{}\tred car",
    'The answer is {} "red".',
    'It is {} "red", because it moves.',
]
# A pronoun stands before these.
OF_NO_PRONOUN = [
    "{} should be correct",
    "{} must be right",
    "{} based on the video",
    "option {} red",
    "The answer is {} and the car is red",
]


@pytest.mark.parametrize("form", FORMS)
def test_every_letter_in_every_form(form):
    """All 26 letters, as capitals and not. None of them is a word, not even A and I."""
    for letter in set(ascii_uppercase) - set("Q" * ("Q" in form)):
        assert parse_letter(form.format(letter), 26) == letter
        assert parse_letter(form.format(letter.lower()), 26) == letter


@pytest.mark.parametrize("form", OF_CAPITALS)
def test_every_capital(form):
    """After a small "a" these words are nouns, as in "a selfie"."""
    for letter in ascii_uppercase:
        assert parse_letter(form.format(letter), 26) == letter


@pytest.mark.parametrize("form", OF_NO_PRONOUN)
def test_every_letter_but_a_pronoun(form):
    for letter in set(ascii_uppercase) - {"I"}:
        assert parse_letter(form.format(letter), 26) == letter
        assert parse_letter(form.format(letter.lower()), 26) == letter
    assert parse_letter(form.format("I"), 26) is None


@pytest.mark.parametrize(
    "form", ["{} red", "Option {} shows a red car", "the red one ({})", "Options\nchoice {}"]
)
def test_capitals(form):
    for letter in set(ascii_uppercase) - set("AI"):
        assert parse_letter(form.format(letter), 26) == letter
    if not form.startswith("{} "):
        assert parse_letter(form.format("A"), 26) == "A"


@pytest.mark.parametrize(
    "text",
    [
        "A man walks",
        "a man walks",
        "A red car",
        "a red car",
        "I think that a man walks",
        "I, for one, do not know",
        "I was wrong",
        "i think so",
        "I'd say a bike",
        "I’d say a bike",  # noqa: RUF001
        "The answer is a red car",
        "The answer is A red car",
        "The answer is I think a car",
        "Answer: a red car.",
        "Answer: A man walks.",
        "It is a car.",
        "It is A car.",
        "option a man would take",
        "A 'red' car",
        "A (red) car",
        "A (red) and white car",
        "A (red), shiny car",
        "A (red)-haired man",
        "A (red) (big) car",
        "A 'man's' car",
        "a (red) car",
        "a (red), shiny car",
        'It is a "selfie".',
        "It is a 'selfie'",
        "A red car is seen",
        "A best friend",
        "A must see",
        "It is a must.",
        "A rather tall man",
        "A and white car",
        "I (the man) think so",
        "I see B",
        "I see B in the video",
        "I see a",
        "I'd say it's 'red'",
        "I say a lot",
        "I'd pick a",  # cut before its noun
        "I would choose a red car",
        "I cannot say B",
        "I don't choose B",
        "I would not choose B",
        "It's a car",
        "It's a",
        "That's a lot",
        "Therefore, a",
        "Therefore, a man walks",
        "Therefore, I think so",
        "So a man walks",
        "The answer is likely a car",
        "The answer is probably A red car",
        "I must be right",
        "option a red car would take",
        "答案：一辆红车",  # noqa: RUF001
        "a.m. or later",
        "i.e. red",
        "e.g. red",
        "d'accord",
        "B-roll of a car",
        "X-ray",
        "The thing that the man holds in his hand is a",  # cut before its noun
        "The man goes to a",
        "don't",
        "",
        "red",
        "The car turns (left)",
        "x_a is b_c",
        "<video>",
        "3",
    ],
)
def test_prose_is_no_letter(text):
    assert parse_letter(text, 26) is None


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A is wrong. B is right.", "B"),
        ("Option A is incorrect. Option C is correct.", "C"),
        ("A is not shown, so the answer is B", "B"),
        ("Option B isn't right; the answer is (D).", "D"),
        ("It is not A. It is C.", "C"),
        ("B, not A", "B"),
        ("A, not option B", "A"),
        ("B is wrong", None),
        ("B looks wrong", None),
        ("B does not fit", None),
        ("A seems incorrect. It's C.", "C"),
        ("B should not be chosen", None),
        ("A does not fit, I'd say D.", "D"),
        ("A and not B", "A"),
        ("The answer is A and B is wrong", "A"),
        ("It's B. Therefore, C.", "C"),
        ("I choose A or B", None),
        ("Option A is not correct.", None),
        ("Not A", None),
        ("A cannot be seen", None),
        ("a or b", None),
        ("(a) and (b)", None),
        ("A and option B", None),
        ("A/B", None),
        ("B, a red car", "B"),
        ("B, I think", "B"),
        ("A. red\nB. blue\nThe answer is B", "B"),  # the options again, then one of them
        ("A. red\nB. blue\n\nAnswer: A\n", "A"),
        ("A\nB", None),
        ("A (red)\nB (blue)", None),
        ('A "red"\nB "blue"', None),
        ("A\tred\nB\tblue", None),
        ("A (red). B (blue).", None),
        ("A (red), B (blue)", None),
        ("A (red)\nB (blue)\nAnswer: B", "B"),
        ("A - red\nB - blue", None),
        ("<answer>A</answer><answer>B</answer>", None),
    ],
)
def test_which_letter_is_meant(text, letter):
    assert parse_letter(text, 4) == letter


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("Answer: yes. There is no bike.", True),
        ("The answer is no, yes would be wrong", False),
        ("<answer>No</answer>", False),
        ("\\boxed{yes}", True),
        ("“Yes, no doubt”", True),
        ("# No\nYes would be wrong.", False),
        ("Answer: yes. Answer: no.", None),
    ],
)
def test_yes_and_no_in_other_forms(text, meant):
    assert parse_yes_no(text) is meant
