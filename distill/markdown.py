"""Text in Markdown: as the letters that it consists of, nothing of it markup."""

import re

# signs of CommonMark and of GitHub's extensions to it: mentions, issues, emoji, mathematics, addresses that become links
_MARKUP = re.compile(r"[\\`*_{}\[\]()<>#|~&$!@^]|:(?![\d\s]|$)|(?<=www)\.", re.IGNORECASE)
# what makes a line one of a list, a rule, or the underlining of a heading, where it begins the line
_BLOCK = re.compile(r"(\d{1,9})(?=[.)](?: |$))|(?=[-+](?: |$)|-[- ]*$|=+$)")


def fenced(text: str) -> str:
    """A text in a fence that nothing in it can close."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def plain(text: str) -> str:
    """One line of Markdown, good at a line's start too, in which no character is markup and no address of the web a link.

    GitHub alone still makes a link of a bare mail address: it looks for those after it has taken the backslashes away.
    """
    line = _MARKUP.sub(lambda found: f"\\{found[0]}", " ".join(text.split()))
    begins = _BLOCK.match(line)
    return f"{begins[0]}\\{line[begins.end() :]}" if begins else line
