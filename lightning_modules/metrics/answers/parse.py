"""Parses an option letter, or yes or no, from a generated text.

Scores depend on the parser as much as on the model. Every change here therefore needs a new
`VERSION`, which is stored with every score. The parser never guesses: a text that it cannot read
gives None, which counts as wrong, and the share of such texts is reported.

The published judges guess. Those of Video-MME and MLVU take the first capital letter A to D
anywhere in the text, such as "A" in "And …". MVBench's also takes the article of "a red car".
"""

import re
from string import ascii_uppercase

#: Version of the rules below.
VERSION = 2

# --- markup ---------------------------------------------------------------------------------------
# Markup is removed first: **B**, `B`, \boxed{\text{B}}, <answer>B</answer> become "B" or
# "Answer: B".
_MARKUP = [
    (re.compile("[\u2018\u2019]"), "'"),
    (re.compile("[\u201c\u201d]"), '"'),
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\boxed\{([^{}]*)\}"), r" Answer: \1\n"),
    (re.compile(r"<(\w+)>"), r" \1: "),
    (re.compile(r"</\w+>"), "\n"),
    (re.compile(r"[*`$#]|(?<!\w)_+|_+(?!\w)"), ""),
    (re.compile(r"[(\[{]\s*([A-Za-z])\s*[)\]}]"), r"(\1)"),
    (re.compile(r"(?<!\w)[\"']([A-Za-z])[\"'](?!\w)"), r'"\1"'),
]

# --- a letter by itself ---------------------------------------------------------------------------
# A letter in brackets or quotes is certain. A bare letter must not be part of a word ("B-roll",
# "d'accord") or of an abbreviation ("a.m."). Bare "A" and "I" are also words. After them, the line
# must end, or continue with words that cannot follow an article ("A best matches", but not "A best
# friend") or a pronoun ("I fits").
_SURE = r"[(\"]([A-Za-z])[)\"]"
_ANOTHER = "anotherletter"  # replaces a letter that the text denies
_AFTER_BOTH = (
    r"because|since|is|fits|looks|appears|seems|matches|describes|shows|which|it\s+is|has\s+to"
    r"|best\s+(?:answers|captures|describes|explains|fits|matches|reflects|represents|shows|suits)"
    r"|(?:due|according)\s+to|rather\s+than|instead\s+of|for\s+(?:the|this)\s+reason"
    rf"|and\s+not|(?:and\s+)?{_ANOTHER}"
)
_AFTER_A = (
    rf"(?:{_AFTER_BOTH}|as|was|would|(?:should|must)\s+be|based\s+on"
    r"|and\s+(?:the|this|it))\b"
)
_AFTER_I = rf"(?:{_AFTER_BOTH})\b"
# Text in brackets or quotes after a letter names its option, unless a noun follows: an "A (red)
# car". After a small "a", quotes belong to a noun: it is a "selfie".
_END_OF_OPTION = rf"""[ \t]* (?: [.;:!?\n](?!\s*[A-Z][ ]*[("'\t]) | [-–—]\s | \Z
    | ,? [ \t]* (?:because|since|as|which|the|it|so|{_ANOTHER}
                 |is\s+(?:the\s+)?(?:right|correct|best|answer))\b )"""  # noqa: RUF001
_BRACKETS = r"\([^()\n]*\)"
_QUOTES = r"""(?: "[^"\n]*" | '(?:[^'\n]|'\w)*' )"""
_IN_BRACKETS = rf"{_BRACKETS} {_END_OF_OPTION}"
_IN_QUOTES = rf"{_QUOTES} {_END_OF_OPTION}"
_ALONE = r"(?!\w|'\w|-\w|\.\w+\.)"
_BARE = rf"""(
      [AI] (?= [ ]*\t | [ ]+ (?:{_IN_BRACKETS}|{_IN_QUOTES}) )
    | [ai] (?= [ ]+ {_IN_BRACKETS} )
    | [Aa] (?! [ \t]+ (?!{_AFTER_A}) [("']?\w )
    | [Ii] (?! ,?[ \t]+ (?!{_AFTER_I}) [("']?\w )
    | [B-HJ-Zb-hj-z]
    ){_ALONE}"""
_LETTER = rf"(?:{_SURE}|{_BARE})"


def _rule(pattern: str, flags: int = 0) -> re.Pattern[str]:
    return re.compile(pattern, re.VERBOSE | flags)


_NAMED = r"(?i:option|choice|letter)"
_IS = r"(?i:\s+(?:is|was|(?:would|should|must)\s+be|(?:seems|appears)\s+to\s+be))"
_SURELY = r"(?i:\s+(?:most\s+)?(?:likely|probably|clearly|certainly|definitely|therefore|thus))"
_CHOOSE = r"(?i:choose|pick|select|say|go\s+with)"
_SO = r"(?i:\b(?:therefore|thus|hence)|(?:^|[.,;]\s+)so)"
_NOT_CUT = r"(?![aIi]\s*$)"  # rejects "what he holds is a", cut off before its noun

#: Ordered from most to least certain; the first rule that finds a letter decides.
_RULES = [
    # "The answer is (B) red", "Answer: B", "The correct option is B"
    _rule(
        rf"\b(?:(?i:answer)(?:\s+{_NAMED})?(?:{_IS}{_SURELY}?)?|{_NAMED}{_IS}{_SURELY}?)\W+"
        rf"(?:(?i:the\s+)?{_NAMED}\W+)?{_LETTER}"
    ),
    # "B", "(b).", also as one line of a longer text
    _rule(r"^[^\w\n]*([A-Za-z])[^\w\n]*$", re.MULTILINE),
    # "B. red", "(b) red", "B - red", each on its own line
    _rule(
        rf"^[^\w\n]*(?: {_SURE} | ([A-Z])[ ]*\t"
        rf"| ([A-Za-z])(?:[.):\]}}](?=\s|$)|\s+(?:[-–—:=]|[-=]?>|→)\s))",  # noqa: RUF001
        re.MULTILINE,
    ),
    # "B red", "B, because", "b is right"
    _rule(rf"^\W*{_LETTER}"),
    # "答案: B", "answer" in Chinese
    _rule(rf"(?:答案|选)\W*[是为选]?\W*{_LETTER}"),
    # "I choose option B", "Option A shows it", "option a red"; not "an option a man would take"
    _rule(
        rf"\b{_NAMED}\W+"
        rf"(?:([A-HJ-Z]){_ALONE} | (a)(?= [ \t]+\w+\W*$) | ([ai])(?= [ ]+{_IN_QUOTES}) | {_LETTER})"
    ),
    # "I choose B", "I'd say B", "Therefore, B"
    _rule(rf"(?:\bI(?:'d|'ll|\s+would|\s+will)?\s+{_CHOOSE}|{_SO},?)\s+{_NOT_CUT}{_LETTER}"),
    # "It is B", "It's probably B"
    _rule(rf"(?:\b(?i:is)|\b(?i:it|that)'s){_SURELY}?\W+{_NOT_CUT}{_LETTER}"),
    # "So B is right"
    _rule(rf"(?:{_SURE}|\b([A-Z]){_ALONE})\s+is\s+(?:the\s+)?(?:right|correct|best|answer)\b"),
    # "the red one (B)"
    _rule(r"\(([A-Z])\)"),
]

# "B is wrong" and "not B" do not name B. A placeholder word replaces them.
_DENIED = _rule(
    rf"""\b(?i:not|neither|nor)\s+(?:{_NAMED}\s+)?{_LETTER}
    | (?:{_SURE}|\b([A-Za-z]){_ALONE})
      \s+(?:(?:is|was|are|can|could|would|should|must|does)(?:\s+not|n't)|cannot|can't
      |(?:is|was|are|looks|appears|seems)\s+(?:wrong|incorrect|false|unlikely))\b"""
)

# "(A) or (B)", "A, b", "A/B": not an answer, even if a rule finds a letter in it.
_SEVERAL = _rule(
    rf"(?<![\w'])\(?([A-Za-z])[).]*\s*(?:,|/|&|\bor\b|\band\b)\s*(?:{_NAMED}\s+)?{_LETTER}"
)

_YES_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
_ANSWERED = re.compile(r"\banswer(?:\s+is)?\W+(yes|no)\b", re.IGNORECASE)


def parse_letter(text: str, options: int) -> str | None:
    """Returns the letter of one of `options` options: A, B, ...

    Returns None if no rule finds a letter, or if the first rule that finds one finds several.
    """
    letters = set(ascii_uppercase[:options])
    text = _DENIED.sub(_ANOTHER, _without_markup(text))
    if any(set(_found(match)) <= letters for match in _SEVERAL.finditer(text)):
        return None
    for rule in _RULES:
        named = {_found(match)[0] for match in rule.finditer(text)} & letters
        if named:
            return named.pop() if len(named) == 1 else None
    return None


def _without_markup(text: str) -> str:
    for pattern, plain in _MARKUP:
        text = pattern.sub(plain, text)
    return text


def _found(match: re.Match[str]) -> list[str]:
    return [letter.upper() for letter in match.groups() if letter]


def parse_yes_no(text: str) -> bool | None:
    """Returns True for yes, False for no, None if the text says neither or both.

    The first word of the text decides, or the word after "answer", or the only one of the two words
    in the text. The published scorer of VideoHallucer accepts either word anywhere, so it counts
    "No, yes" as right for every question.
    """
    text = _without_markup(text)
    words = [(match.start(), match.group().lower()) for match in _YES_NO.finditer(text)]
    if words and not re.search(r"\w", text[: words[0][0]]):
        return words[0][1] == "yes"
    kinds = {match[1].lower() for match in _ANSWERED.finditer(text)} or {word for _, word in words}
    return "yes" in kinds if len(kinds) == 1 else None
