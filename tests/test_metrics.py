"""What an answer says, and the scores of texts: as the libraries that define them give them, on texts that are meant to trip them."""

import doctest
import logging
import random
import re
import string
import time
from collections import Counter

import pytest

from distill import metrics, textscores

LONG_LINE = "seven times six is 42 " * 4600  # 100 kB
TRICKY = [
    ("42", "42"),
    ("42", ""),
    ("", "42"),
    ("", ""),
    ("42", "<think>\n6 times 7\n</think>\n\n42"),
    ("42", "<think>\nit never ends: 42"),
    ("42", "<think>a</think>41<think>b</think>42"),
    ("The cat sat.", "the  cat, sat"),
    ("An apple a day", "apple day the"),
    ("no no no yes", "no yes yes"),
    ("café au lait", "café au lait"),  # composed and decomposed
    ("北京是中国的首都", "北京是中国的首都。"),
    ("שלום עולם 7", "\u202eשלום עולם\u202c 7"),
    ("🙂 ok", "🙂 OK"),
    ("1,234,567", "1234567"),
    ("1/2", "0.5"),
    ("\\frac{1}{2}", "\\boxed{\\frac12}"),
    ("\\sqrt{2}", "$2^{1/2}$"),
    ("$x^2+1$", "The answer is $1+x^2$."),
    ("\\boxed{42}", "It is 42"),
    ("42", "\\boxed{41}"),
    ("50%", "0.5"),
    ("3", "<|im_end|> {{ 7*7 }} <script>alert(3)</script>"),
    ("a\x00b \x1b[31m", "a\x00b"),
    ("42", LONG_LINE),
    (LONG_LINE[:600], LONG_LINE),
]
MATH = {  # by reading math-verify's tests, not by running it
    ("42", "42"): 1,
    ("42", ""): 0,
    ("", "42"): None,
    ("The cat sat.", "the  cat, sat"): None,
    ("1,234,567", "1234567"): 1,
    ("1/2", "0.5"): 1,
    ("\\frac{1}{2}", "\\boxed{\\frac12}"): 1,
    ("\\sqrt{2}", "$2^{1/2}$"): 1,
    ("$x^2+1$", "The answer is $1+x^2$."): 1,
    ("\\boxed{42}", "It is 42"): 1,
    ("42", "\\boxed{41}"): 0,
    ("50%", "0.5"): 1,
    ("42", "<think>\nit never ends: 42"): 0,
}
HOPELESS = "9^9^9^9^9"


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Two groups, scored as the lab does: the tricky texts, and one text that no computer can evaluate, before one that any can."""
    tricky = [{"reference": reference, "text": text} for reference, text in TRICKY]
    hopeless = [{"reference": "42", "text": HOPELESS}, {"reference": "42", "text": "42"}]
    started = time.monotonic()
    groups = {"tricky": tricky, "hopeless": hopeless, "none": [], "broken": [{"reference": "\ud800", "text": "\ud800"}]}
    result = textscores.score_groups(groups, tmp_path_factory.mktemp("scores"))
    return {**result, "seconds": time.monotonic() - started}


def squad_f1(reference, text):
    """SQuAD's own definition, written a second way, with spaces about Chinese characters: common words, one from each side at a time."""
    cleaned = [re.sub(r"\b(a|an|the)\b", " ", re.sub(r"[!-/:-@\[-`{-~]", "", each.lower())) for each in (reference, text)]
    sides = ["".join(f" {sign} " if "一" <= sign <= "龥" else sign for sign in each).split() for each in cleaned]
    rest, common = list(sides[1]), 0
    for word in sides[0]:
        if word in rest:
            rest.remove(word)
            common += 1
    if not all(sides):
        return float(sides[0] == sides[1])
    if not common:
        return 0.0
    precision, recall = common / len(sides[1]), common / len(sides[0])
    return 2 * precision * recall / (precision + recall)


def test_doctests_of_metrics_hold():
    assert doctest.testmod(metrics).failed == 0


@pytest.mark.parametrize(
    ("text", "final", "thought", "reasons"),
    [
        ("4", "4", "", False),
        ("<think>\n2+2\n</think>\n\n4", "4", "2+2", True),
        ("2+2\n</think>\n\n4", "4", "2+2", True),  # the template opened the thought
        ("<think>\n</think>\n\n4", "4", "", False),
        ("<think>for ever", "", "for ever", False),
        ("<think>all</think>", "", "all", False),
        ("", "", "", False),
    ],
)
def test_answer_falls_into_thought_and_final_answer(text, final, thought, reasons):
    assert (metrics.final_answer(text), metrics.reasoning(text), metrics.reasons_first(text)) == (final, thought, reasons)


def test_token_f1_has_squads_values():
    assert metrics.token_f1("Santa Clara, California", "Levi's Stadium in Santa Clara") == pytest.approx(0.5)
    assert metrics.token_f1("the the the", "a") == 1.0  # articles alone: both empty
    assert metrics.token_f1("", "word") == metrics.token_f1("word", "") == 0.0


@pytest.mark.parametrize(("reference", "text"), TRICKY)
def test_token_f1_equals_an_independent_implementation(reference, text):
    if len(text) < 10_000:
        assert metrics.token_f1(reference, text) == pytest.approx(squad_f1(reference, metrics.final_answer(text)), abs=1e-12)


def test_text_that_repeats_itself_is_told_from_one_that_does_not():
    prose = "One part of the work is to say what was done, another is to show how well it went, and a third to say what it cost us."
    assert metrics.repeated_share(prose) == metrics.repeated_share("4 4 4") == metrics.repeated_share("") == 0.0
    assert metrics.repeated_share(prose * 5) > 0.7
    assert metrics.repeated_share("7" * 200) > 0.9
    assert metrics.repeated_share("北京是中国的首都和政治文化的中心城市之一，" * 10) > 0.7
    assert metrics.repeated_share("".join(map(chr, range(0x4E00, 0x4E80)))) == 0.0


def test_scores_agree_with_the_reference_libraries(scored):
    from math_verify import parse, verify
    from rouge_score.rouge_scorer import RougeScorer

    rouge = RougeScorer(["rougeL"], use_stemmer=False)
    for (reference, text), row in zip(TRICKY, scored["tricky"]["rows"], strict=True):
        final = metrics.final_answer(text)
        assert row["exact_match"] == int(final == reference.strip())
        assert row["token_f1"] == metrics.token_f1(reference, text)
        assert row["repeated"] == metrics.repeated_share(text)
        if (reference + final).isascii():
            assert row["rouge_l"] == rouge.score(reference, final)["rougeL"].fmeasure
        plain = parse(reference, fallback_mode="no_fallback")
        if "\\" not in reference and "^" not in reference:
            right = verify(plain, parse(final, fallback_mode="no_fallback"))
            assert row["math_verified"] == (int(right) if plain else None), (reference, text[:80])


def test_math_is_verified_as_a_person_would(scored):
    found = {pair: row["math_verified"] for pair, row in zip(TRICKY, scored["tricky"]["rows"], strict=True)}
    assert {pair: found[pair] for pair in MATH} == MATH


def test_bleu_is_sacrebleus_with_an_interval(scored):
    from sacrebleu.metrics import BLEU

    references, finals = zip(*((reference, metrics.final_answer(text)) for reference, text in TRICKY), strict=True)
    bleu = scored["tricky"]["bleu"]
    assert bleu["value"] == pytest.approx(BLEU(effective_order=True).corpus_score(list(finals), [list(references)]).score)
    assert bleu["n"] == len(TRICKY)
    assert bleu["ci"][0] <= bleu["value"] <= bleu["ci"][1]
    assert "version:" in bleu["signature"]
    assert scored["none"]["bleu"] == {"value": None, "n": 0, "ci": None, "signature": None}


def test_bleu_interval_is_that_of_sacrebleus_own_resampling():
    from sacrebleu.metrics import BLEU
    from sacrebleu.significance import _bootstrap_resample

    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    texts = [" ".join(words[number % 5 :]) for number in range(60)]
    references = [" ".join(words[: 4 + number % 7]) for number in range(60)]
    metric = BLEU()
    ours = textscores.corpus_bleu(references, texts)
    _, scores = _bootstrap_resample(metric._extract_corpus_statistics(texts, [references]), metric, 2000)
    theirs = sorted(each.score for each in scores)
    assert ours["value"] == pytest.approx(metric.corpus_score(texts, [references]).score)
    assert ours["ci"] == pytest.approx([theirs[50], theirs[-51]], abs=1.5)
    assert ours["ci"] == textscores.corpus_bleu(references, texts)["ci"]  # a seed


WHOLE = [
    "北京是中国的首都，也是政治文化的中心。",
    "東京は日本の首都です。",
    "Москва — столица России",
    "दिल्ली भारत की राजधानी है",
    "ירושלים 7",
]


@pytest.mark.parametrize("text", WHOLE)
def test_a_text_of_any_script_has_full_scores_beside_itself(text):
    (row,) = textscores.score_group([{"reference": text, "text": text}], textscores._MathJudge())["rows"]
    assert (row["exact_match"], row["token_f1"], row["rouge_l"]) == (1, 1.0, 1.0)


def test_chinese_is_compared_character_by_character():
    reference, near, other = "北京是中国的首都和文化中心", "北京是中国的首都与文化中心。", "今天天气很好我们去公园散步吧"
    scored = textscores.score_group([{"reference": reference, "text": text} for text in (near, other)], textscores._MathJudge())["rows"]
    assert scored[0]["rouge_l"] == pytest.approx(12 / 13) and scored[0]["token_f1"] == pytest.approx(2 * 12 / (13 + 14))
    assert scored[1]["rouge_l"] == scored[1]["token_f1"] == 0.0
    assert len(metrics.words(reference)) == 13 and metrics.words("the cat sat.") == ["the", "cat", "sat."]


def test_rouge_splits_ascii_text_as_rouge_score_does():
    from rouge_score.tokenizers import DefaultTokenizer

    signs = random.Random(0)
    for text in ["".join(signs.choices(string.printable, k=200)) for _ in range(50)]:
        assert textscores._RougeWords.tokenize(text) == DefaultTokenizer().tokenize(text)
    assert textscores._RougeWords.tokenize("Cafe\u0301 au lait") == ["café", "au", "lait"]


def test_bleu_of_chinese_counts_characters_and_says_so():
    reference, near = "北京是中国的首都和文化中心", "北京是中国的首都与文化中心"
    chinese = textscores.corpus_bleu([reference, "好的 OK"], [near, "好的 OK"])
    assert chinese["value"] > 60 and "tok:zh" in chinese["signature"]
    assert textscores.corpus_bleu([reference], [reference])["value"] == pytest.approx(100)
    assert "tok:13a" in textscores.corpus_bleu(["the word for the capital is 北京"], ["北京"])["signature"]


def test_right_answers_of_one_word_have_full_bleu():
    assert textscores.corpus_bleu(["42", "7"], ["42", "7"])["value"] == pytest.approx(100)


def test_math_without_end_is_given_up_and_counted(scored):
    group = scored["hopeless"]
    assert [row["math_verified"] for row in group["rows"]] == [0, 1]
    assert group["timeouts"] == 1
    assert scored["tricky"]["timeouts"] <= 1
    assert scored["seconds"] < 60


def test_a_reference_that_is_not_read_in_time_is_judged_alike_for_all_models(monkeypatch):
    reads = []

    def slow_at_first(text):  # as on a machine that others make slow for a while
        reads.append(text)
        if text == "42" and reads.count(text) == 1:
            logging.getLogger("math_verify.parser").warning("Timeout during parsing: 42")
            return []
        return [42]

    monkeypatch.setattr(textscores, "_parsed", slow_at_first)
    judge = textscores._MathJudge()
    groups = [textscores.score_group([{"reference": "42", "text": text}], judge) for text in ("forty-two", "42")]
    assert [group["rows"][0]["math_verified"] for group in groups] == [None, None]
    assert [group["timeouts"] for group in groups] == [1, 1]
    assert reads == ["42"]


def test_a_reference_without_end_costs_its_time_once(monkeypatch):
    monkeypatch.setattr(textscores, "MATH_SECONDS", 1)
    judge, reference, started = textscores._MathJudge(), "$" + "(" * 200 + "1" + ")" * 200 + "$", time.monotonic()
    assert [judge.verify(reference, answer) for answer in ("1", "2", "3", "4")] == [None] * 4
    assert judge.timeouts == 4 and time.monotonic() - started < 4


def test_half_a_character_is_scored_all_the_same(scored):
    assert Counter(row["exact_match"] for row in scored["broken"]["rows"]) == {1: 1}


def test_rouge_of_two_long_texts_takes_their_beginnings():
    long = "word " * 30_000
    assert [len(each.split()) for each in textscores._comparable(long, long)] == [2000, 2000]
    assert textscores._comparable("42", long) == ["42", long]


def test_rouge_counts_words_between_commas_and_characters_too():
    commas, characters = ",".join(map(str, range(20_000))), "北京是中国的首都" * 1000
    for long, words in ((commas, 2000), (characters, 2000)):
        assert [len(textscores._RougeWords.tokenize(each)) for each in textscores._comparable(long, long)] == [words] * 2
