"""Generated text -> the option or the yes or no that it means, or nothing.

Scores depend on this as much as on the model: a change here is another `VERSION`, which stands
beside every score. What cannot be read is nothing, never a guess; it counts as wrong, and is
counted.
"""

import re
from collections.abc import Sequence
from string import ascii_uppercase

#: Of the rules below.
VERSION = 1

# A letter by itself, which brackets or stars may surround. "A" and "I" are also words: what follows
# has to show that they are not.
_LETTER = (
    r"[(\[*]*"
    r"(?:(?P<word>[AI])(?=[)\]*.,:;!?]|\s*$|\s+(?:because|since|as)\b)|(?P<name>[B-HJ-Z]))"
    r"(?!\w|'|-\w)"
)

#: From the surest to the least sure; the first that finds anything decides.
_RULES = [
    re.compile(r"^\W*(?P<any>[A-Za-z])\W*$"),  # "B", "(b).", "**B**"
    re.compile(r"(?:^|\n)\W*(?P<any>[A-Za-z])[.):\]](?=\s|$)"),  # "B. red", "(b) red", a line each
    re.compile(r"\b(?i:answer(?:\s+is)?)\W+" + _LETTER),  # "The answer is (B) red"
    re.compile(r"^\W*" + _LETTER),  # "B red", "B, because"
    re.compile(r"\b(?i:option|choice|letter|is)\W+" + _LETTER),  # "It is B", "I choose option B"
    re.compile(r"[(\[](?P<any>[A-Z])[)\]]"),  # "the red one (B)"
]

# "(A) or (B)", "A, B", "A/B": no answer, whatever rule would find one in it.
_SEVERAL = re.compile(
    r"\b(?P<one>[A-Z])[)\].*]*\s*(?:,|/|&|\bor\b|\band\b)\s*[(\[*]*(?P<other>[A-Z])(?!\w|')"
)

_YES_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


def parse_letter(text: str, options: int) -> str | None:
    """The letter of one of so many options: A, B, ...; None where no rule finds just one."""
    letters = ascii_uppercase[:options]
    if any({match["one"], match["other"]} <= set(letters) for match in _SEVERAL.finditer(text)):
        return None
    for rule in _RULES:
        found = _letters(rule, text, letters)
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def _letters(rule: re.Pattern[str], text: str, letters: Sequence[str]) -> set[str]:
    matches = (match.groupdict() for match in rule.finditer(text))
    named = {next(filter(None, groups.values()), "").upper() for groups in matches}
    return named & set(letters)


def parse_yes_no(text: str) -> bool | None:
    """True for yes, False for no: the word that the text begins with, or the only one in it.

    The published scorer of VideoHallucer takes either word anywhere, and so calls "No, yes" right
    whatever was asked.
    """
    words = [(match.start(), match.group().lower()) for match in _YES_NO.finditer(text)]
    if words and not text[: words[0][0]].strip(" \n\t\"'*(.:-"):
        return words[0][1] == "yes"
    kinds = {word for _, word in words}
    return "yes" in kinds if len(kinds) == 1 else None
