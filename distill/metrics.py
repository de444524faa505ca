"""What an answer says and how far it is right; pure, without libraries."""

import re
import string
from collections import Counter

from .prompt import REASONING_TAGS

PIECE_WORDS = 4
PIECE_CHARS = 20  # for text without spaces, as Chinese is written
FEWEST_PIECES = 8
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CJK = r"\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han and kana
_WORD = re.compile(f"[{_CJK}]|[^\\s{_CJK}]+")


def words(text: str) -> list[str]:
    """The words of a text: what stands between spaces, and each Chinese or Japanese character, which are written without.

    >>> words("GPT 的意思, ok?")
    ['GPT', '的', '意', '思', ',', 'ok?']
    """
    return _WORD.findall(text)


def is_cjk(text: str) -> bool:
    """Whether more than half of a text's letters are Chinese or Japanese characters.

    >>> is_cjk("GPT 的意思是"), is_cjk("the word 北京"), is_cjk("42")
    (True, False, False)
    """
    letters = "".join(filter(str.isalpha, text))
    return 2 * len(re.findall(f"[{_CJK}]", letters)) > len(letters)


def final_answer(text: str) -> str:
    """What an answer says in the end: the text behind its reasoning, stripped; empty where the reasoning never ends.

    >>> final_answer("<think>\\n2 + 2 = 4\\n</think>\\n\\n4")
    '4'
    """
    opened, closed = REASONING_TAGS
    if closed in text:
        return text.rpartition(closed)[2].strip()
    return "" if opened in text else text.strip()


def reasons_first(text: str) -> bool:
    """Whether an answer shows a whole thought, with words in it, before what it says in the end.

    >>> reasons_first("<think>\\n2 + 2 = 4\\n</think>\\n\\n4"), reasons_first("<think>\\n</think>\\n\\n4")
    (True, False)
    """
    opened, closed = REASONING_TAGS
    thought, found, _ = text.partition(closed)
    return bool(found and thought.removeprefix(opened).strip() and final_answer(text))


def reasoning(text: str) -> str:
    """What an answer thinks before it says it: the text up to its last `</think>`, without tags; all of it where that never comes.

    >>> reasoning("<think>\\n2 + 2 = 4\\n</think>\\n\\n4")
    '2 + 2 = 4'
    """
    opened, closed = REASONING_TAGS
    if closed not in text and opened not in text:
        return ""
    thought = text.rpartition(closed)[0] if closed in text else text
    return thought.strip().removeprefix(opened).strip()


def exact_match(reference: str, text: str) -> bool:
    """Whether an answer says in the end what its reference says, letter by letter.

    >>> exact_match("42", "<think>6 x 7</think> 42"), exact_match("42", "42.")
    (True, False)
    """
    return final_answer(text) == reference.strip()


def token_f1(reference: str, text: str) -> float:
    """F1 of the final answer's words against the reference's, each as often as it stands there; from 0 to 1.

    Two that are empty agree. Words are those of `words`.
    Source: Rajpurkar et al. 2016, arXiv:1606.05250, and SQuAD 2.0's evaluation script (lower case; ASCII punctuation and articles dropped),
    which takes Chinese text without a space for one word.

    >>> token_f1("the cat sat", "A cat!")
    0.6666666666666666
    """
    wanted, given = _squad_words(reference), _squad_words(final_answer(text))
    if not wanted or not given:
        return float(wanted == given)
    common = (Counter(wanted) & Counter(given)).total()
    return 2 * common / (len(wanted) + len(given))


def _squad_words(text: str) -> list[str]:
    return words(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)))


def repeated_share(text: str) -> float:
    """Share of a text's runs of four words that stood in it before, from 0 to 1; above 0.5 it repeats itself.

    Text with hardly a space is counted in runs of 20 characters. A text of fewer than eight runs is too short to tell: 0.

    >>> repeated_share("so it is 4, " * 20) > 0.9, repeated_share("what is said but once is no repetition of anything at all")
    (True, 0.0)
    """
    spaced = text.split()
    parts, size = (spaced, PIECE_WORDS) if len(text) < PIECE_CHARS * len(spaced) else (text, PIECE_CHARS)
    pieces = [tuple(parts[start : start + size]) for start in range(len(parts) - size + 1)]
    return 1 - len(set(pieces)) / len(pieces) if len(pieces) >= FEWEST_PIECES else 0.0
