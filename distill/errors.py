"""Every error that a user of the lab is meant to meet: it says what happened, why, and what to do."""

import re
from difflib import get_close_matches

# a user name and password in an address, whole or as a path's normal form; a token in their place; a key of the hub's, of OpenAI's, of
# GitHub's or of AWS's form. An @ after the host, as in https://medium.com/@me/post, is none of these;
# 300 characters bound the time that a hostile text takes
_SECRETS = (
    (re.compile(r"(:/{1,2})[^\s/:@\"]*:(?!\d+[/?#\"])\S{0,300}@"), r"\1***@"),
    (re.compile(r"(https?:/{1,2})[^\s/:@]+@"), r"\1***@"),
    (re.compile(r"\b(?:hf_\w{16,}|sk-[\w-]{16,}|gh[oprsu]_\w{16,}|github_pat_\w{16,}|A[KS]IA[0-9A-Z]{16})"), "***"),
)


class DistillError(Exception):
    """Base of the lab's errors. The message is complete by itself; a traceback would add nothing. No secret stays in it."""

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))

    def _render_traceback_(self) -> list[str]:
        """What IPython and Jupyter show in place of a traceback: the message alone."""
        return [f"{type(self).__name__}: {self}"]


class ConfigError(DistillError):
    """A setting, path or model name that cannot work."""

    @classmethod
    def from_problems(cls, where: str, problems: list[str]) -> "ConfigError":
        """All problems of one place in one message, a line each, so that one look mends them all."""
        count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
        return cls("\n  ".join([f"{count} in {where}", *problems]))


class DataError(DistillError):
    """Data that is missing, unreadable, of another schema, or leaves nothing to train on."""


class PreflightError(DistillError):
    """A run that cannot fit the memory or disk at hand."""


class BackendError(DistillError):
    """A training process that did not leave a good checkpoint."""


def without_secrets(text: str) -> str:
    """A text without the passwords that an address in it may carry, and without keys.

    >>> without_secrets("No model at https://me:secret@host/x")
    'No model at https://***@host/x'
    """
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


def did_you_mean(name: str, known) -> str:
    """' Did you mean X?' for a near miss, else ''."""
    near = get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""


def shortened(text, limit_chars: int = 200) -> str:
    """The beginning of a text, safe to print: one line, cut with a note of how much was left out."""
    text = "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(str(text).split()))
    return text if len(text) <= limit_chars else f"{text[:limit_chars]}… ({len(text) - limit_chars:,} more characters)"
