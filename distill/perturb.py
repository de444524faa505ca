"""The same question in other words, and with slips of the pen: how much a student hangs on the wording that it was trained on.

Both changes take any text, and leave alone what an answer may hang on: numbers, upper-case codes, LaTeX, code, addresses, and what stands
in quotes. Not covered: a question about an unquoted lower-case word ("How long is banana?"), whose misspelling is another question.
"""

import random
import re
from collections.abc import Callable

# (before, after); none holds a number, an upper-case code or a quotation mark
WRAPPERS = (
    ("Please help me with this. ", ""),
    ("I have a question. ", ""),
    ("Hello! ", ""),
    ("Could you solve this for me? ", ""),
    ("", " Thank you."),
    ("Please answer this one: ", ""),
    ("Hi there, ", " Many thanks!"),
)
SHARE_MISSPELT = 0.2
FEWEST_LETTERS = 4
_NUMBER_WORD = re.compile(
    "zero|four|five|seven|eight|nine|eleven|twelve|three|half|third|quarter|twice|double|triple|dozen|first|second"
    "|[a-z]+teen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundreds?|thousands?|[mb]illions?"
)
_KEPT = re.compile(
    r"""
    ```.*?(?:```|\Z) | ~~~.*?(?:~~~|\Z) | `[^`]*`                            # code
    | \$\$.*?\$\$ | \$[^$\n]+\$ | \\\[.*?\\\] | \\\(.*?\\\)                  # LaTeX
    | \\begin\{.*?\\end\{[^}]*\} | \\[A-Za-z]+(?:\{[^}]*\})*
    | "[^"]*" | “[^”]*” | «[^»]*» | „[^“”]*[“”] | (?<!\w)['‘][^'’\n]*['’](?!\w)    # what is quoted
    | <[^>\n]*>                                                              # markup
    """,
    re.DOTALL | re.VERBOSE,
)
# a whole word between spaces, with the punctuation of prose around it: what touches any other sign may be code, a path or an address
_WORD = re.compile(rf"(?<!\S)([(\[]?)([^\W\d_]{{{FEWEST_LETTERS},}})(?=[.,;:!?)\]]*(?:\s|\Z))")
_CAPITALISED = re.compile(r"[A-Z][a-z]+(?=\s)")


def rephrased(text: str, rng: random.Random) -> str:
    """A question in other clothes: polite words around it, its first letter small behind a comma, its last sign doubled or gone.

    rng  decides which; the same state gives the same text

    >>> rephrased("Reverse the letters TNIG.", random.Random(2))
    'Hi there, reverse the letters TNIG. Many thanks!'
    """
    before, after = rng.choice([wrapper for wrapper in WRAPPERS if wrapper[0] or _ends_openly(text)])
    if before.endswith((", ", ": ")) and _CAPITALISED.match(text):
        text = text[0].lower() + text[1:]
    if not after and _ends_openly(text):
        text = rng.choice((text, text.removesuffix("."), text + text[-1]))
    return before + text + after


def _ends_openly(text: str) -> bool:
    """Whether a text's end is a sentence of the question's own, not material that it hands over: one line without colon, quote or code."""
    return not re.search(r"[:\n\"'`“”‘’«»$\\]", text) and text.endswith((".", "?", "!"))


def misspelt(text: str, rng: random.Random) -> str:
    """A question with a slip in about one ordinary word in five, at least one where there is one: letters swapped, dropped or doubled.

    rng  decides which; the same state gives the same text

    >>> misspelt("Reverse the letters TNIG.", random.Random(0))
    'Reverse the lettres TNIG.'
    """
    kept = [found.span() for found in _KEPT.finditer(text)]
    words = [found.span(2) for found in _WORD.finditer(text) if _is_ordinary(found[2]) and not _overlaps(found.span(2), kept)]
    if not words:
        return text
    chosen = rng.sample(words, max(1, round(SHARE_MISSPELT * len(words))))
    for start, end in sorted(chosen, reverse=True):
        text = text[:start] + _slip(text[start:end], rng) + text[end:]
    return text


def _is_ordinary(word: str) -> bool:
    return word.islower() and not _NUMBER_WORD.fullmatch(word)


def _overlaps(span: tuple[int, int], others: list[tuple[int, int]]) -> bool:
    return any(span[0] < end and start < span[1] for start, end in others)


def _slip(word: str, rng: random.Random) -> str:
    """A word of four letters or more with one slip, never in its first letter."""
    place = rng.randrange(1, len(word) - 1)
    swapped = word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    dropped = word[:place] + word[place + 1 :]
    doubled = word[: place + 1] + word[place:]
    return rng.choice([other for other in (swapped, dropped, doubled) if other != word])


PROMPTS: dict[str, Callable[[str, random.Random], str]] = {
    "as written": lambda text, rng: text,
    "rephrased": rephrased,
    "misspelt": misspelt,
}


def perturbed(text: str, kind: str, seed: int | str) -> str:
    """A question as one of PROMPTS has it; the same seed gives the same text, in any order of the questions."""
    return PROMPTS[kind](text, random.Random(f"{kind}:{seed}"))
