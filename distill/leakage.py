"""Held-out questions that training saw, word for word or nearly, found and taken out.

Compared are a question's instruction and input. Two are the same where their words, numbers and signs are: case, spaces, punctuation and
the width of letters say nothing; a decimal point, an exponent, a sign of arithmetic between operands and a bracket that it joins do.
A question of FEWEST_WORDS or more is a near-duplicate too where one row holds SHARE of its runs of RUN_WORDS words, as PaLM counts
contamination (arXiv:2204.02311). Not covered: the same question in other words or another language.

    Find the sum of 347 and 285.  =  FIND the  sum of: ３４７ and 285!     What is 347 + 285?  ≠  What is 347 - 285?
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from .errors import shortened

RUN_WORDS = 8
FEWEST_WORDS = 16
SHARE = 0.7
SAME, N_GRAMS = "same", "n-grams"

MOST_CHARS = 1_000_000  # of a text that are looked at: a row bounds the memory too

# NFKC would make 52 of 5², and 11/2 of 1½
_SUPERSCRIPTS = re.compile("[²³¹⁰ⁱ⁴-ⁿ]+")
_FRACTIONS = re.compile("(?=[¼-¾⅐-⅞])")
_PIECES = re.compile(r"\S{1,256}")  # NFKC takes time as the square of a run of accents
_THOUSANDS = re.compile(r",(?<=\d,)(?=\d{3}(?!\d))")
_UNSURE = re.compile(r"([-*/()])\1*")  # signs of arithmetic, or punctuation
_OPERAND_ENDS = re.compile(r"(?:[\d)]|(?<![^\W\d_])[^\W\d_]) ?$")
_OPERAND_STARTS = re.compile(r" ?(?:[\d(.+-]|[^\W\d_](?![^\W\d_]))")
_JOINING = frozenset("+-*/=<>^%")
_FOLDED = dict(zip("−×·∙⋅÷⁄∕[]{}", "-****///()()", strict=True))
_MEANT = str.maketrans("-*/()", "−×÷[]")
_TOKENS = re.compile(r"[^\s\d.,*/()#+=<>^%−×÷\[\]-]+|\d+(?:\.\d+)*|(?<![\w.])\.\d+|[+<>^%−×÷\[\]]|=(?! ?$)|(?<=\w)#")


@dataclass(frozen=True)
class Leakage:
    """Held-out questions, looked up in the training rows.

    kept             the questions that training did not see, in their order
    removed          the others: {"id", "instruction", "training", "how"}, texts cut; how: "same" or "n-grams"
    checked_against  training rows looked at; None where there were none to look at
    """

    kept: list[dict]
    removed: list[dict]
    checked_against: int | None


def clean(questions: list[dict], training: Iterable[dict]) -> Leakage:
    """Take out the questions that stand in the training rows, or nearly.

    questions  [{"id", "instruction", "input"?}];  training  [{"instruction", "input"?}], read once, a row at a time
    Memory grows with the questions alone.
    """
    index, found, rows = _Index(questions), {}, 0
    for row in training:
        rows += 1
        for number, how in index.matches(_text(row)):
            if number not in found or (how == SAME != found[number]["how"]):
                found[number] = _removed(questions[number], row, how)
    kept = [question for number, question in enumerate(questions) if number not in found]
    return Leakage(kept, [found[number] for number in sorted(found)], rows)


class _Index:
    """The questions by what they say, and the long ones by their runs of words."""

    def __init__(self, questions: list[dict]) -> None:
        self.by_tokens, self.by_run, self.needed = defaultdict(list), defaultdict(list), {}
        for number, question in enumerate(questions):
            tokens = words(_text(question))
            self.by_tokens[" ".join(tokens)].append(number)
            if len(tokens) >= FEWEST_WORDS:
                runs = set(_runs(tokens))
                self.needed[number] = SHARE * len(runs)
                for run in runs:
                    self.by_run[run].append(number)

    def matches(self, text: str) -> Iterator[tuple[int, str]]:
        """Yield the numbers of the questions that a text gives away, and how."""
        tokens = words(text)
        for number in self.by_tokens.get(" ".join(tokens), ()):
            yield number, SAME
        if self.by_run and len(tokens) >= RUN_WORDS:
            shared = set(filter(self.by_run.__contains__, _runs(tokens)))
            counts = Counter(number for run in shared for number in self.by_run[run])
            yield from ((number, N_GRAMS) for number, count in counts.items() if count >= self.needed[number])


def words(text: str) -> list[str]:
    """A text's words, numbers and meaningful signs, in one form; the text itself where it has none.

    Scripts without spaces (Chinese, Japanese) count each character as a word.

    >>> words("What's 3,000 - 1.5, well-known?")
    ['whats', '3000', '−', '1.5', 'well', 'known']
    """
    if not text.isascii():
        text = _FRACTIONS.sub(" ", _SUPERSCRIPTS.sub(r"^\g<0>", text))
        text = _PIECES.sub(lambda piece: unicodedata.normalize("NFKC", piece[0]), text)
    plain = " ".join(text.casefold().translate(_CHARACTERS).split())
    return _TOKENS.findall(_UNSURE.sub(_meant, _THOUSANDS.sub("", plain))) or [text]


def _meant(sign: re.Match) -> str:
    """A sign that carries meaning in a form of its own; any other as it is, to be dropped like punctuation.

    A bracket does where an operator joins it; an operator between operands (a number, a name of one letter, what stands in brackets), which
    a hyphen between words does not have; a minus right before a number.
    """
    text, kind = sign.string, sign[0]
    before, after = text[max(0, sign.start() - 3) : sign.start()], text[sign.end() : sign.end() + 3]
    if kind[0] in "()":
        meant = (before.rstrip()[-1:] if kind[0] == "(" else after.lstrip()[:1]) in _JOINING
    else:
        negative = kind == "-" and after[:1].isdigit() and not before[-1:].isalnum()
        meant = negative or (_OPERAND_ENDS.search(before) and _OPERAND_STARTS.match(after))
    return kind.translate(_MEANT) if meant else kind


class _Characters(dict):
    """What becomes of a character, by its code point; filled as characters come."""

    def __missing__(self, code: int) -> str:
        letter = chr(code)
        self[code] = _character(letter, unicodedata.category(letter), unicodedata.name(letter, ""))
        return self[code]


def _character(letter: str, category: str, name: str) -> str:
    if letter in "+-*/=<>^%#(),.":
        return letter
    if letter in _FOLDED or category == "Pd":
        return _FOLDED.get(letter, "-")
    if category == "Cf" or letter in "'’‘`" or name.startswith("VARIATION SELECTOR"):
        return ""
    if category[0] in "PZ" or category in ("Cc", "Sk") or letter == "$":
        return " "
    alone = category[0] == "S" or name.startswith(("CJK", "HIRAGANA", "KATAKANA"))
    return f" {letter} " if alone else letter


_CHARACTERS = _Characters()


def _runs(tokens: list[str]) -> Iterator[tuple]:
    return zip(*(islice(tokens, start, None) for start in range(RUN_WORDS)), strict=False)


def _text(row: dict) -> str:
    return f"{row['instruction']}\n{row.get('input') or ''}"[:MOST_CHARS]


def _removed(question: dict, row: dict, how: str) -> dict:
    return {"id": question["id"], "instruction": shortened(_text(question)), "training": shortened(_text(row)), "how": how}
