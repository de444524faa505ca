"""Text in Markdown: as the letters that it consists of, nothing of it markup."""

import re

_MARKUP = re.compile(r"([\\`*_{}\[\]()<>#|~$&!])")


def fenced(text: str) -> str:
    """A text in a fence that nothing in it can close."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def plain(text: str) -> str:
    """One line of Markdown in which no character is markup."""
    return _MARKUP.sub(r"\\\1", " ".join(text.split()))
