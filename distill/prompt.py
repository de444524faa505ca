"""The only place that renders chat text, and the only place that says which tokens are supervised.

A row becomes token ids in two parts: the *asked* tokens (the model's own chat template around the user turn, with its
generation prompt) and the answer with its end of turn. They are joined as ids, so the asked tokens are a prefix of the trained
ones by construction, with any template. Text from data is inert: it never passes through the template, and a control string in it
is tokenized as the letters it consists of.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256

from .errors import ConfigError, shortened
from .store import hash_json

MODES = ("system1", "system2")
COT_SENTENCE = "Please think step by step and explain your reasoning before giving the final answer."
REASONING_TAGS = ("<think>", "</think>")
# Stands for a turn's text while the template runs; a noncharacter that no template and no tokenizer knows.
PLACEHOLDER = "\ufdd0turn\ufdd1"


def format_prompt(instruction: str, input_text: str = "", mode: str = "system1") -> str:
    """The user turn as plain text: instruction, input, and for System 2 the sentence that asks for reasoning; no chat markup.

    >>> format_prompt("Add.", "1 2")
    'Add.\\n\\n1 2'
    """
    if mode not in MODES:
        raise ConfigError(f"mode = {mode!r}: there is no such mode. Use 'system1' or 'system2'.")
    parts = [instruction, input_text, COT_SENTENCE if mode == "system2" else ""]
    return "\n\n".join(part.strip() for part in parts if part.strip())


def is_trace(output: str) -> bool:
    """Whether an output is one thought between tags of its own, then a solution, neither of them empty."""
    opened, closed = REASONING_TAGS
    thought, _, solution = output.removeprefix(opened).partition(closed)
    once = output.startswith(opened) and output.count(opened) == output.count(closed) == 1
    return once and bool(thought.strip() and solution.strip())


def row_id(instruction: str, input_text: str = "") -> str:
    """A row's id: the first 16 hex digits of the SHA-256 of its question, as it is asked plainly."""
    return hash_json(format_prompt(instruction, input_text))[:16]


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold a text."""
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can smuggle in and UTF-8 cannot hold
        return False
    return True


@dataclass(frozen=True)
class ChatFormat:
    """How one model's template frames a turn, as token pieces.

    before         text up to the user's words, split into control tokens (int) and plain text (str)
    after          from the user's words to the end of the generation prompt, split likewise
    end_of_turn    id of the token that ends an answer
    opens_thought  True where the generation prompt itself ends with an open <think> tag
    """

    before: tuple[int | str, ...]
    after: tuple[int | str, ...]
    end_of_turn: int
    opens_thought: bool


def asked_ids(tokenizer, instruction: str, input_text: str = "", mode: str = "system1") -> list[int]:
    """Token ids of the question as the model is asked it: chat template, user turn, generation prompt."""
    chat = chat_format(tokenizer, mode)
    user = format_prompt(instruction, input_text, mode)
    ids: list[int] = []
    # plain text that touches the user's words is tokenized together with them, as the template's whole text would be
    for piece in _joined([*chat.before, user, *chat.after]):
        ids += [piece] if isinstance(piece, int) else text_ids(tokenizer, piece)
    return ids


def trained_ids(tokenizer, instruction: str, output: str, input_text: str = "", mode: str = "system1") -> tuple[list[int], list[int]]:
    """Token ids of a training row and its completion mask.

    Returns (input_ids, completion_mask), equally long; the mask is 1 on the answer and its end of turn, 0 on the asked tokens.

    >>> trained_ids(qwen, "Add 2 and 2.", "4")      # doctest: +SKIP
    ([151644, 872, 198, …, 151645, 198, 151644, 77091, 198, 19, 151645], [0, …, 0, 1, 1])
    """
    chat = chat_format(tokenizer, mode)
    asked = asked_ids(tokenizer, instruction, input_text, mode)
    opening, answer = _behind_open_thought(output.strip()) if chat.opens_thought else ("", output.strip())
    # a plain answer has no use for a reasoning model's tags: there they are text like any other
    keep = REASONING_TAGS if mode == "system2" else ()
    completion = [*text_ids(tokenizer, opening, keep=REASONING_TAGS), *text_ids(tokenizer, answer, keep), chat.end_of_turn]
    return asked + completion, [0] * len(asked) + [1] * len(completion)


def _behind_open_thought(answer: str) -> tuple[str, str]:
    """How an answer goes on behind a generation prompt that has opened the thought: (what closes an empty one, the rest)."""
    opened, closed = REASONING_TAGS
    return ("", answer.removeprefix(opened).lstrip("\n")) if closed in answer else (f"\n{closed}\n\n", answer)


def stop_ids(tokenizer) -> list[int]:
    """Ids that end generation: the template's end of turn, then the tokenizer's end of text where it is another."""
    ids = [chat_format(tokenizer, "system1").end_of_turn]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids.append(tokenizer.eos_token_id)
    return ids


def text_ids(tokenizer, text: str, keep: tuple[str, ...] = ()) -> list[int]:
    """Token ids of plain text in which control strings are letters, not control tokens.

    A string that the tokenizer would take for an added token is tokenized in two parts, cut behind its first letter.
    keep  added tokens that the text may use (a reasoning model's own <think> tags, in an answer)
    """
    cuts = [match.start() + 1 for match in _added_tokens(tokenizer, len(tokenizer), keep).finditer(text)]
    ids: list[int] = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        if start < end:
            # verbose=False: a text longer than the model takes is no news, rows are measured
            ids += tokenizer(text[start:end], add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def chat_format(tokenizer, mode: str) -> ChatFormat:
    """Read a tokenizer's chat template once, with placeholders in place of the turns.

    Raises ConfigError where there is no template, or one that does not show the user's words exactly once.
    """
    return _chat_format(tokenizer, tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None, mode)


@lru_cache(maxsize=32)
def _chat_format(tokenizer, template: str | None, mode: str) -> ChatFormat:
    name = tokenizer.name_or_path or "the tokenizer"
    if not tokenizer.chat_template:
        raise ConfigError(f"{name} has no chat template, so it cannot be asked. Use its Instruct version, or add a chat_template.jinja.")
    asked = _render(tokenizer, [{"role": "user", "content": PLACEHOLDER}], mode, add_generation_prompt=True)
    if asked.count(PLACEHOLDER) != 1:
        raise ConfigError(f"The chat template of {name} shows the user's words {asked.count(PLACEHOLDER)} times; it must show them once.")
    before, after = asked.split(PLACEHOLDER)
    return ChatFormat(
        before=tuple(_pieces(tokenizer, before)),
        after=tuple(_pieces(tokenizer, after)),
        end_of_turn=_end_of_turn(tokenizer, mode),
        opens_thought=after.rstrip().endswith("<think>"),
    )


def _end_of_turn(tokenizer, mode: str) -> int:
    """The first control token that the template puts behind an answer; the tokenizer's end of text where it puts none."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PLACEHOLDER}]
    _, answer, behind = _render(tokenizer, turns, mode, add_generation_prompt=False).rpartition(PLACEHOLDER)
    for piece in _pieces(tokenizer, behind if answer else ""):
        if isinstance(piece, int):
            return piece
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{tokenizer.name_or_path} names no end of turn and no end of text, so its answers could never stop.")
    return tokenizer.eos_token_id


def _render(tokenizer, messages: list[dict], mode: str, add_generation_prompt: bool) -> str:
    # enable_thinking: templates of Qwen3's kind close the thought at once for an answer without one; others ignore it
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, enable_thinking=mode == "system2"
        )
    except TemplateError as error:
        raise ConfigError(f"The chat template of {tokenizer.name_or_path} cannot be used: {shortened(error)}.") from error


def tokenizer_hash(tokenizer) -> str:
    """SHA-256 (hex) of all that decides a row's token ids: vocabulary, merges, added tokens and chat template."""
    return sha256((tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template)).encode()).hexdigest()


def _pieces(tokenizer, text: str) -> list[int | str]:
    """Split the template's own text into its control tokens (ids) and the plain text between them."""
    vocabulary = tokenizer.get_added_vocab()
    if not vocabulary:
        return [text] if text else []
    longest_first = "|".join(re.escape(token) for token in sorted(vocabulary, key=len, reverse=True))
    return [vocabulary.get(piece, piece) for piece in re.split(f"({longest_first})", text) if piece]


def _joined(pieces: list[int | str]) -> list[int | str]:
    """Neighbouring strings as one."""
    joined: list[int | str] = []
    for piece in pieces:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


@lru_cache(maxsize=32)
def _added_tokens(tokenizer, size: int, keep: tuple[str, ...]) -> re.Pattern:
    """Matches, without consuming, every place where an added token's string begins; `size` tells a grown vocabulary from before."""
    tokens = [re.escape(token) for token in tokenizer.get_added_vocab() if token not in keep and len(token) > 1]
    return re.compile(f"(?={'|'.join(tokens)})" if tokens else r"(?!)")
