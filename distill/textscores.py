"""Scores of answers' texts by the libraries that define them, in a subprocess (`python -m distill.textscores --request FILE`).

The kernel of a notebook may lack the libraries, and math-verify keeps its time limits by signals, which need a main thread.
"""

import argparse
import logging
import re
import unicodedata
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from . import engine, metrics, store
from .console import progress

PACKAGES = ("rouge-score", "sacrebleu", "math-verify", "sympy")
RESAMPLES = 2000
MATH_SECONDS = 5  # for each of: the reference's reading, the answer's reading, their comparison; math-verify's own default
# ROUGE-L's table has a cell for each pair of words: of longer pairs, the first 2,000 words of each are compared
ROUGE_CELLS = 4_000_000
ROUGE_WORDS = 2000
REPORT_EVERY_ROWS = 20
TIMEOUT = "Timeout during"  # how math-verify's messages begin
_TEX_WITHOUT_SIGNS = re.compile(r"(?!.*(\$|\\\(|\\\[|\\boxed|[a-z]{2} +[a-z]{2})).*(\\[a-z]|\^)", re.DOTALL | re.IGNORECASE)


def score_groups(groups: dict[str, list[dict]], run_folder: Path) -> dict[str, dict]:
    """Score the answers of several models, all in one subprocess.

    groups      name → [{"reference": the right final answer, "text": a model's whole answer}]
    run_folder  where the log goes, textscores.log
    Returns {name: {"rows", "bleu", "timeouts", "versions"}}; all scores are of the text behind the reasoning.
        rows      in order, [{"exact_match": 0 | 1, "token_f1": 0–1, "rouge_l": 0–1, "math_verified": 0 | 1 | None, "repeated": 0–1}]
                  rouge_l        F-measure, without a stemmer (Lin 2004, W04-1013; rouge-score), over words of any script
                  math_verified  math-verify finds the answer equal to the reference; None where the reference holds no math, or none
                                 that is read in time, which is found out once, so that it is the same for all models
                  repeated       of the whole text, reasoning and all (`metrics.repeated_share`)
        bleu      {"value": 0–100 | None, "n", "ci": [low, high] | None, "signature"}: corpus BLEU (Papineni et al. 2002, P02-1040) by
                  sacrebleu, with no higher order of n-grams than the answers have, so that those of one word count; characters are its
                  words where the references are Chinese, as the signature says ("tok:zh"); percentile interval at 95% over resampled rows
        timeouts  rows on which math-verify's time ran out; they count as wrong, but for those whose reference is not read in time
    Raises BackendError with the end of the log.
    """
    if not groups:
        return {}
    store.make_folder(run_folder)
    with TemporaryDirectory(dir=run_folder) as folder:
        request, result = Path(folder) / "request.json", Path(folder) / "result.json"
        pairs = {name: [_writable(pair) for pair in group] for name, group in groups.items()}
        store.write_json(request, {"groups": pairs, "result": str(result)})
        log, title = run_folder / "textscores.log", "Scoring texts"
        with progress(title, total=sum(map(len, groups.values()))) as update:
            arguments = ["--request", str(request)]
            ended = engine.run_module("distill.textscores", arguments, log, lambda event: update(event["done"], note=event["name"]))
        if ended.status or not result.is_file():
            raise engine.failure(title, ended, log)
        return store.read_json(result)


def _writable(pair: dict) -> dict:
    """A pair as UTF-8 can hold it: half of a character (a lone surrogate) becomes a question mark."""
    return {key: pair[key].encode(errors="replace").decode() for key in ("reference", "text")}


# In the engine's process


def main() -> None:
    """Score the groups of a request file."""
    parser = argparse.ArgumentParser(prog="python -m distill.textscores", description="Score the texts of answers.")
    parser.add_argument("--request", required=True, help="JSON: {groups, result}, as distill.textscores.score_groups writes it")
    job = store.read_json(parser.parse_args().request)
    judge, scored, done = _MathJudge(), {}, 0
    for name, pairs in job["groups"].items():
        scored[name] = score_group(pairs, judge, lambda rows, name=name, before=done: engine.emit(name=name, done=before + rows))
        done += len(pairs)
    store.write_json(job["result"], scored)


def score_group(pairs: list[dict], judge: "_MathJudge", finished: Callable[[int], None] = lambda rows: None) -> dict:
    """Score one model's answers, in this process. Takes and returns what `score_groups` does, of one group.

    judge     that of all groups
    finished  called now and then with the number of rows that are done
    """
    from rouge_score.rouge_scorer import RougeScorer

    rouge, rows, timeouts_before = RougeScorer(["rougeL"], tokenizer=_RougeWords), [], judge.timeouts
    for pair in pairs:
        if len(rows) % REPORT_EVERY_ROWS == 0:
            finished(len(rows))
        rows.append(_row(pair["reference"], pair["text"], rouge, judge))
    finished(len(rows))
    finals = [metrics.final_answer(pair["text"]) for pair in pairs]
    return {
        "rows": rows,
        "bleu": corpus_bleu([pair["reference"] for pair in pairs], finals),
        "timeouts": judge.timeouts - timeouts_before,
        "versions": {package: version(package) for package in PACKAGES},
    }


def _row(reference: str, text: str, rouge, judge: "_MathJudge") -> dict:
    final = metrics.final_answer(text)
    return {
        "exact_match": int(metrics.exact_match(reference, text)),
        "token_f1": metrics.token_f1(reference, text),
        "rouge_l": rouge.score(*_comparable(reference, final))["rougeL"].fmeasure,
        "math_verified": judge.verify(reference, final),
        "repeated": metrics.repeated_share(text),
    }


def _comparable(*texts: str) -> list[str]:
    """Two texts as they are, or their beginnings where ROUGE-L would need too much time and memory for the whole."""
    words = [_RougeWords.tokenize(text) for text in texts]
    if len(words[0]) * len(words[1]) <= ROUGE_CELLS:
        return list(texts)
    return [" ".join(each[:ROUGE_WORDS]) for each in words]


class _RougeWords:
    """What ROUGE compares: lower-case runs of letters and digits, as by rouge-score itself, which knows none but ASCII's."""

    @staticmethod
    def tokenize(text: str) -> list[str]:
        letters = unicodedata.normalize("NFC", text.lower())
        return metrics.words("".join(sign if sign.isalnum() or unicodedata.category(sign)[0] == "M" else " " for sign in letters))


class _MathJudge(logging.Filter):
    """math-verify, with a count of the rows on which its time ran out, which it says in its logs alone."""

    def __init__(self) -> None:
        super().__init__()
        self.timeouts, self.ran_out = 0, False
        self.references: dict[str, tuple[list, bool]] = {}
        for module in ("parser", "grader"):
            logging.getLogger(f"math_verify.{module}").addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        if str(record.msg).startswith(TIMEOUT):
            self.ran_out, record.msg = True, TIMEOUT  # the text is a stranger's, and the log is read for events
        return True

    def verify(self, reference: str, final: str) -> int | None:
        """Whether an answer is, as math, what the reference is; None where that holds none, or none that is read in time."""
        from math_verify import verify

        wanted, self.ran_out = self._wanted(reference)
        given = [each for reading in _readings(final) for each in _parsed(reading)] if wanted else []
        is_right = verify(wanted, given, timeout_seconds=MATH_SECONDS)
        self.timeouts += self.ran_out
        return int(is_right) if wanted else None

    def _wanted(self, reference: str) -> tuple[list, bool]:
        """The math in a reference and whether time ran out on it; read once, since a second reading may take longer or less."""
        if reference not in self.references:
            self.ran_out = False
            wanted = next(filter(None, map(_parsed, reversed(_readings(reference)))), [])
            self.references[reference] = wanted, self.ran_out
        return self.references[reference]


def _readings(text: str) -> list[str]:
    """A text, and where it is TeX without the signs that mark it, as data sets write their answers, that with these signs."""
    return [text, f"${text}$"] if _TEX_WITHOUT_SIGNS.match(text) else [text]


def _parsed(text: str) -> list:
    """The math in a text, as sympy's expressions; empty where there is none, or it cannot be parsed."""
    from math_verify import parse

    return parse(text, fallback_mode="no_fallback", parsing_timeout=MATH_SECONDS)


def corpus_bleu(references: list[str], texts: list[str], seed: int = 0) -> dict:
    """sacrebleu's corpus BLEU with a percentile interval at 95% over resampled rows, as "bleu" in `score_groups`."""
    import numpy as np
    from sacrebleu.metrics import BLEU

    if not texts:
        return {"value": None, "n": 0, "ci": None, "signature": None}
    bleu = BLEU(effective_order=True, tokenize="zh" if metrics.is_cjk("".join(references)) else "13a")
    value = bleu.corpus_score(texts, [references]).score
    rows = [bleu.sentence_score(text, [reference]) for text, reference in zip(texts, references, strict=True)]
    counts = np.array([[row.sys_len, row.ref_len, *row.counts, *row.totals] for row in rows])
    taken = np.random.default_rng(seed).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=RESAMPLES)
    resampled = [_bleu_of(bleu, sums) for sums in (taken @ counts).tolist()]
    ci = np.percentile(resampled, [2.5, 97.5]).tolist()
    return {"value": value, "n": len(rows), "ci": ci, "signature": str(bleu.get_signature())}


def _bleu_of(bleu, sums: list[int]) -> float:
    given, wanted, *counts = sums
    orders = bleu.max_ngram_order
    smoothing = {"smooth_method": bleu.smooth_method, "effective_order": bleu.effective_order}
    return bleu.compute_bleu(counts[:orders], counts[orders:], given, wanted, **smoothing).score


if __name__ == "__main__":
    main()
