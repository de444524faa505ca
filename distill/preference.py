"""Which of two answers a model prefers, the teacher's or the student's: every pair is asked about in both orders.

EasyDistill 2.x has no job for pairs, so the questions are the lab's own (`replies`).
"""

import re
from collections import Counter
from pathlib import Path

from . import store
from .console import say, table
from .endpoint import PROMPTS, Endpoint, filled, read_prompt
from .errors import ConfigError, DataError, shortened
from .generation import token_limit
from .intervals import wilson
from .prompt import format_prompt, is_unicode
from .replies import replies_once
from .report import add

TEACHER, STUDENT, TIE, MALFORMED, UNANSWERED = "teacher", "student", "tie", "malformed", "unanswered"
PAIRWISE = PROMPTS / "pairwise.txt"
PLACES = ("{instruction}", "{answer_a}", "{answer_b}", "{mark}")
VERDICT = re.compile(r"\W*(?:(?:final )?verdict\W*)?\[\[(A|B|TIE)\]\]\W*", re.I)
VERDICT_MAX_TOKENS = 1024
NEEDED = ("instruction", TEACHER, STUDENT)


def prefer(
    pairs,
    endpoint: Endpoint,
    *,
    mode: str | None = None,
    max_new_tokens: int = VERDICT_MAX_TOKENS,
    seed: int = 0,
    out: str | Path = "reports/preference.json",
) -> dict:
    """Let a model say of each pair whose answer is better; print a table and write it as JSON.

    pairs           [{"id", "instruction", "teacher": text, "student": text}] and, where there is one, "input"; or an evaluation
                    (`pairs_of`)
    endpoint        the judge, asked at temperature 0; without base_url the lab serves it
    mode            of an evaluation: which system; None takes the first
    max_new_tokens  limit of what the judge says about one pair, its verdict included
    seed            of the marks that fence the answers; another one asks everything anew
    Returns {"judge", "mode", "models", "seed", "n": pairs, "equal": pairs of the same text, which are ties and not asked about,
    "pairs": [{"id", "sha256" (of question and answers), "first_order" (teacher shown first), "second_order", "verdict"}], "student",
    "teacher", "tie", "preferred", "inconsistent", "position_bias", "malformed", "unanswered"}. The orders say "teacher", "student", "tie",
    "malformed" or "unanswered" (None: not asked); a verdict is "tie" where they differ, None where one says nothing. The shares are
    {"value", "n", "ci"}: student, teacher, tie of all verdicts; preferred: the student's of those that are no tie; inconsistent: pairs
    asked about whose orders differ; position_bias: of single replies that name an answer, those that name the first shown (0.5 is
    none). malformed and unanswered count single replies.

    Two orders cancel a liking for a place, and fences keep an answer from posing as the prompt. Neither keeps an answer from persuading
    the judge by its words, and control strings in it are the judge's server's affair: where answers can be checked, `evaluate` says more.
    Source: Zheng et al. 2023, arXiv:2306.05685.
    Raises ConfigError or DataError for what cannot be judged, BackendError where the judge cannot be asked.
    """
    if not isinstance(endpoint, Endpoint):
        raise ConfigError(f"endpoint = {endpoint!r}: is no Endpoint. Write e.g. Endpoint('gpt-4o', 'https://api.openai.com/v1').")
    limit = token_limit(max_new_tokens, "system1")
    given, facts = pairs, None if isinstance(pairs, list) else facts_of(pairs)
    of = {"mode": mode, "models": None, "pairs": _checked(pairs)} if facts is None else pairs_of(facts, mode)
    pairs = of["pairs"]
    endpoint.check()
    store.check_writable(out)
    prompt = read_prompt(PAIRWISE, *PLACES)
    texts = [_both_orders(prompt, pair, seed) for pair in pairs]
    asked = [text for pair, both in zip(pairs, texts, strict=True) if not is_equal(pair) for text in both]
    replies = replies_once(endpoint, asked, limit, "preferences", "Judging")
    rows = [_judged(pair, [replies.get(text) for text in both]) for pair, both in zip(pairs, texts, strict=True)]
    report = {"judge": endpoint.name, "mode": of["mode"], "models": of["models"], "seed": seed, **_summary(rows)}
    written = store.write_json(out, report)
    _show(report)
    say(f"  {store.shown(written)}")
    if facts is not None:
        add(given, facts, "judge", of["mode"], report)
    return report


# Pairs


def pairs_of(evaluation, mode: str | None = None) -> dict:
    """The answers of teacher and student in an evaluation: {"mode", "models": {"teacher": path, "student": path}, "pairs"}.

    evaluation  what `evaluate_student` returned, its `to_dict()`, or the path of report.json
    mode        "system1" or "system2"; None takes the first that was evaluated
    Raises ConfigError for a mode that was not evaluated, DataError for what is no evaluation.
    """
    facts = facts_of(evaluation)
    try:
        systems = facts["systems"]
        mode = mode or next(iter(systems))
        if mode not in systems:
            raise ConfigError(f"mode = {mode!r}: was not evaluated, only {' and '.join(systems)}.")
        names = {role: systems[mode][role] for role in (TEACHER, STUDENT)}
        paths = {role: facts["models"][name]["path"] for role, name in names.items()}
        pairs = [_pair_of(case, names) for case in systems[mode]["cases"]]
    except (KeyError, TypeError, AttributeError, StopIteration):
        raise DataError("This is no evaluation of the lab: give what evaluate_student returned, or the path of its report.json.") from None
    return {"mode": mode, "models": paths, "pairs": _checked(pairs)}


def facts_of(evaluation) -> dict:
    """An evaluation's plain values: of what `evaluate_student` returned, of its `to_dict()`, or of report.json."""
    facts = store.read_json(evaluation) if isinstance(evaluation, str | Path) else evaluation
    return facts.to_dict() if hasattr(facts, "to_dict") else facts


def _pair_of(case: dict, names: dict) -> dict:
    texts = {role: case["answers"][name]["text"] for role, name in names.items()}
    return {"id": str(case["id"]), "instruction": case["instruction"], "input": case.get("input") or "", **texts}


def _checked(pairs: list[dict]) -> list[dict]:
    """The pairs. Raises DataError that names the first that is none, or says that there is none."""
    if not pairs:
        raise DataError("There is nothing to judge: no pair of answers is given.")
    for number, pair in enumerate(pairs):
        texts = [*[pair.get(name) for name in NEEDED], pair.get("input") or ""] if isinstance(pair, dict) else [None]
        if not all(isinstance(text, str) and is_unicode(text) for text in texts) or not pair["instruction"].strip() or "id" not in pair:
            raise DataError(f"pair {number} is no pair {{'id', 'instruction', 'teacher', 'student'}}. It is {shortened(pair, 120)}.")
    return pairs


def pair_hash(pair: dict) -> str:
    """What a pair is known by, whatever its id: SHA-256 (hex) of its question and answers."""
    return store.hash_json([_question(pair), pair[TEACHER], pair[STUDENT]])


def _question(pair: dict) -> str:
    return format_prompt(pair["instruction"], pair.get("input") or "")


def is_equal(pair: dict) -> bool:
    """Whether both answers are the same text, blanks around it aside."""
    return pair[TEACHER].strip() == pair[STUDENT].strip()


def _both_orders(prompt: str, pair: dict, seed: int) -> list[str]:
    """What the judge is asked about a pair: with the teacher's answer as A, then with the student's."""
    # no text can hold a hash of itself, so no answer can end its own fence
    mark = store.hash_json([seed, pair_hash(pair)])[:16]
    orders = ((pair[TEACHER], pair[STUDENT]), (pair[STUDENT], pair[TEACHER]))
    return [filled(prompt, instruction=_question(pair), answer_a=first, answer_b=second, mark=mark) for first, second in orders]


# Verdicts


def verdict_of(reply: dict | None, shown: tuple[str, str]) -> str:
    """What one reply says: "teacher", "student" or "tie", "malformed" or "unanswered".

    reply  {"text", "stopped"}, None where there is none; the verdict is its last line, [[A]], [[B]] or [[TIE]]
    shown  whose answers A and B are

    >>> verdict_of({"text": "B is short. A is right.\\n[[A]]", "stopped": True}, ("teacher", "student"))
    'teacher'
    """
    if reply is None:
        return UNANSWERED
    lines = reply["text"].strip().splitlines()
    found = VERDICT.fullmatch(lines[-1]) if lines and reply["stopped"] else None
    return {"A": shown[0], "B": shown[1], "TIE": TIE}[found[1].upper()] if found else MALFORMED


def _judged(pair: dict, replies: list[dict | None]) -> dict:
    """One pair's row of the report."""
    first = second = None
    verdict = TIE
    if not is_equal(pair):
        first, second = verdict_of(replies[0], (TEACHER, STUDENT)), verdict_of(replies[1], (STUDENT, TEACHER))
        silent = {first, second} & {MALFORMED, UNANSWERED}
        verdict = None if silent else first if first == second else TIE
    return {"id": pair["id"], "sha256": pair_hash(pair), "first_order": first, "second_order": second, "verdict": verdict}


def _summary(rows: list[dict]) -> dict:
    orders = [(row["first_order"], row["second_order"]) for row in rows if row["first_order"]]
    judged = [pair for pair in orders if not {*pair} & {MALFORMED, UNANSWERED}]
    said = Counter(one for pair in orders for one in pair)
    of_first = sum((first == TEACHER) + (second == STUDENT) for first, second in orders)
    return {
        "n": len(rows),
        "equal": len(rows) - len(orders),
        "pairs": rows,
        **shares([row["verdict"] for row in rows if row["verdict"]]),
        "inconsistent": share(sum(first != second for first, second in judged), len(judged)),
        "position_bias": share(of_first, said[TEACHER] + said[STUDENT]),
        MALFORMED: said[MALFORMED],
        UNANSWERED: said[UNANSWERED],
    }


def shares(verdicts: list[str]) -> dict:
    """How often each won: {"student", "teacher", "tie", "preferred"}, each with Wilson's interval; preferred leaves ties out."""
    won = Counter(verdicts)
    of_all = {who: share(won[who], len(verdicts)) for who in (STUDENT, TEACHER, TIE)}
    return {**of_all, "preferred": share(won[STUDENT], won[STUDENT] + won[TEACHER])}


def share(count: int, n: int) -> dict:
    """A proportion {"value", "n", "ci"} with Wilson's interval; value and ci None of nothing."""
    return wilson(count, n) if n else {"value": None, "n": 0, "ci": None}


def in_words(found: dict) -> tuple[str, str]:
    """A share and its interval in percent; dashes where there is none."""
    if found["value"] is None:
        return "–", "–"
    low, high = found["ci"]
    return f"{found['value']:.1%}", f"{low:.1%} to {high:.1%}"


def _show(report: dict) -> None:
    named = {
        "student's is better": STUDENT,
        "teacher's is better": TEACHER,
        "tie": TIE,
        "student's, of no tie": "preferred",
        "orders differ": "inconsistent",
        "first shown, of replies": "position_bias",
    }
    rows = [[title, *in_words(report[key]), report[key]["n"]] for title, key in named.items()]
    table(f"Pairs judged by {report['judge']}", ["", "share", "95%", "n"], rows)
    for count, what in ((report["equal"], "pairs are equal: ties, not asked about"), (report[MALFORMED], "replies have no verdict")):
        if count:
            say(f"  {count:,} {what}")
    if report[UNANSWERED]:
        say(f"  {report[UNANSWERED]:,} questions have no answer; the same call asks them again")
