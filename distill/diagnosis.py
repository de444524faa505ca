"""Is a student broken, and by what? Read from its measured quality; pure.

Each check asks for evidence that a good but imperfect student does not show: the whole 95% interval lies beyond the limit.
Only a gain over what it was before its training must be shown: without proof of one, there is none.
"""

from .quality import QUALITY, REASONS

STOPPED_LEAST = 0.9
REPEATING_MOST = EMPTY_MOST = 0.1
AGREEMENT_BY_CHANCE = 0.2
ANSWER_METRICS = {"exact_match": "exact match", "math_verified": "verified answers", "token_f1": "token F1"}


def diagnose(quality: dict, before: dict | None, comparisons: dict, facts: dict) -> list[dict]:
    """What is wrong with a student, the cause that explains most first: [{"what", "evidence", "advice"}]; [] for a good one.

    quality      its quality in its own mode (`quality.quality`): {"n", "exact_match": {"value", "n", "ci"}, …}
    before       the same before its training; None where nobody asked it
    comparisons  {"retained": {metric: {"value", "n", "ci"}}, "against_before": {metric: {"value", "n", "ci", "p"}}}; exact match has
                 "mcnemar" there too
    facts        {"template_differs": whether its chat template is another than the one it was trained with, None where nobody knows;
                 "limit_tokens": the most that an answer may take; "vocabulary": tokens that it knows; "mode": "system1" or "system2"} and,
                 where it is so, "not_finite": True, its forward passes give NaN or infinity
    One fault brings others with it: mend the first and evaluate again.
    """
    found = [
        _not_finite(quality, facts),
        _template(facts),
        _chance(quality, facts),
        _never_stops(quality, facts),
        _repeats(quality),
        _empty(quality),
        _does_not_reason(quality, facts),
        _no_better(before, comparisons),
    ]
    return [fault for fault in found if fault]


def _not_finite(quality: dict, facts: dict) -> dict | None:
    if not facts.get("not_finite"):
        return None
    return _fault(
        "Its weights are not finite.",
        f"Its forward passes give NaN or infinity where probabilities should be. Exact match is {_share(quality['exact_match'])}.",
        "Lower learning_rate and train anew, or go back to a checkpoint from before the loss in metrics.jsonl ceased to be a number; where "
        "it never did, the file was damaged behind the training: export or copy it again.",
    )


def _template(facts: dict) -> dict | None:
    if not facts["template_differs"]:
        return None
    return _fault(
        "Its chat template is not the one that it was trained with.",
        "The template of the checkpoint frames a turn in other tokens than its training rows did.",
        "Put the chat_template.jinja and tokenizer files of its training back into the checkpoint (those of the student that it was made "
        "from), or distil it anew.",
    )


def _chance(quality: dict, facts: dict) -> dict | None:
    """Random weights are as surprised by right answers as a guess among all tokens, and hit none of the teacher's next ones.

    A student that only lacks its end of turn, or is asked in another template, can be as surprised on short answers, and hits many.
    """
    perplexity, agreement = quality["perplexity"], quality["agreement"]
    if not perplexity or perplexity["ci"][0] < facts["vocabulary"] / 2 or (agreement and agreement["ci"][1] >= AGREEMENT_BY_CHANCE):
        return None
    hits = f"; it would go on as the teacher does at {_share(agreement)} of their tokens" if agreement else ""
    return _fault(
        "It knows no more than chance, as random weights do.",
        f"Perplexity on the reference answers is {perplexity['value']:,.0f}; guessing among its {facts['vocabulary']:,} tokens gives "
        f"{facts['vocabulary']:,}{hits}. Exact match is {_share(quality['exact_match'])}.",
        "Look whether this is the trained checkpoint and whether its loss fell: if it did not, or swings, lower learning_rate; if it fell "
        "too little, raise num_epochs or give more rows. Start from a pretrained student.",
    )


def _never_stops(quality: dict, facts: dict) -> dict | None:
    if quality["stopped"]["ci"][1] >= STOPPED_LEAST:
        return None
    return _fault(
        "Its answers do not stop by themselves.",
        f"{_share(quality['stopped'])} of them reach their end of turn; the limit is {facts['limit_tokens']:,} tokens, their mean "
        f"{quality['tokens']['value']:,.0f}.",
        "Rows must be trained to their end of turn: raise max_length rather than cut them, and look at eos_token_id in the checkpoint's "
        "generation_config.json. Where answers are sound and merely long, evaluate with a higher max_new_tokens.",
    )


def _repeats(quality: dict) -> dict | None:
    if quality["repeating"]["ci"][0] <= REPEATING_MOST:
        return None
    return _fault(
        "It repeats itself.",
        f"{_share(quality['repeating'])} of its answers say more than half of their words again.",
        "Look at the training rows for outputs that repeat themselves and leave them out; lower num_epochs or learning_rate where the "
        "validation loss rose.",
    )


def _empty(quality: dict) -> dict | None:
    if quality["empty"]["ci"][0] <= EMPTY_MOST:
        return None
    return _fault(
        "It often says nothing in the end.",
        f"{_share(quality['empty'])} of its answers are empty, or never leave their reasoning.",
        "Look at the training rows for empty outputs and thoughts without an end; where thoughts are cut off, evaluate with a higher "
        "max_new_tokens, or train on shorter ones (a lower rv_max).",
    )


def _does_not_reason(quality: dict, facts: dict) -> dict | None:
    if facts["mode"] != "system2" or quality["reasoned"]["ci"][1] >= REASONS:
        return None
    return _fault(
        "It is a System-2 student and does not reason before it answers.",
        f"{_share(quality['reasoned'])} of its answers show a whole thought first; {REASONS:.0%} are wanted.",
        "Train it on whole traces: outputs with <think>…</think> before the answer, and a max_length that holds them; raise num_epochs.",
    )


def _no_better(before: dict | None, comparisons: dict) -> dict | None:
    """A rise of any measure will do, since texts are not judged by exact match alone; so will being near the teacher: little is left."""
    changes = {name: comparisons["against_before"][name] for name in ANSWER_METRICS if name in comparisons["against_before"]}
    kept = [estimate["value"] for name, estimate in comparisons["retained"].items() if name in changes]
    near = [value >= QUALITY for value in kept if value is not None]
    if not before or any(change["ci"][0] > 0 for change in changes.values()) or (near and all(near)):
        return None
    worse = [ANSWER_METRICS[name] for name, change in changes.items() if change["ci"][1] < 0]
    return _fault(
        f"It is worse than before its training: {', '.join(worse)} fell." if worse else "It is no better than before its training.",
        "; ".join(_change(name, change) for name, change in changes.items()) + ".",
        "Look whether the loss fell: if not, raise learning_rate or num_epochs; if it swings, lower learning_rate. Then give more rows, of "
        "the kind of these questions, and ask more questions where the intervals are wide.",
    )


def _change(name: str, change: dict) -> str:
    low, high = change["ci"]
    pairs = change.get("mcnemar")
    counts = f", {pairs['gained']} gained and {pairs['lost']} lost" if pairs else ""
    p = pairs["p"] if pairs else change["p"]
    return (
        f"{ANSWER_METRICS[name]} changed by {change['value']:+.3f} (95%: {low:+.3f} to {high:+.3f}, n = {change['n']}{counts}, p = {p:.2g})"
    )


def _fault(what: str, evidence: str, advice: str) -> dict:
    return {"what": what, "evidence": evidence, "advice": advice}


def _share(estimate: dict) -> str:
    low, high = estimate["ci"]
    return f"{estimate['value']:.1%} (95%: {low:.1%} to {high:.1%}, n = {estimate['n']})"
