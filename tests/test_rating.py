"""Blind pairs rated by a person: signs, persistence, what the page shows, agreement with a judge."""

import json

import pytest

from distill import rating, store
from distill.errors import ConfigError, DataError
from distill.intervals import wilson
from distill.preference import pair_hash, pairs_of
from distill.rating import kappa, parse_ratings, rate_answers


@pytest.fixture(autouse=True)
def in_project(project):
    pass


def evaluation(texts: list[tuple[str, str]] | None = None) -> dict:
    """An evaluation of one system: the teacher's and the student's answer to each question."""
    texts = texts or [(f"<think>\nthought {n}\n</think>\n\nbig {n}", f"small {n}") for n in range(12)]
    names = ("teacher", "system1")
    cases = [
        {"id": f"c{n}", "instruction": f"question {n}", "input": "", "answers": {k: {"text": t} for k, t in zip(names, both, strict=True)}}
        for n, both in enumerate(texts)
    ]
    models = {name: {"path": f"secret-folder/{name}", "title": f"Secret {name}"} for name in names}
    known = {"judge": {}, "ratings": {}, "out": "reports/evaluation", "made": "now"}
    return {**known, "models": models, "systems": {"system1": {"teacher": "teacher", "student": "system1", "cases": cases}}}


def sides(count: int = 10, given: dict | None = None, **settings) -> list[str]:
    """Which sign means the student, pair by pair, told by the answers themselves."""
    shown = rate_answers(given or evaluation(), pairs=count, **settings).shown
    return ["A" if page["A"].startswith("small") else "B" for page in shown]


def other(sign: str) -> str:
    return "B" if sign == "A" else "A"


def kept(name: str = "reports/ratings.json") -> dict:
    return store.read_json(name)


# Signs


@pytest.mark.parametrize("text", ["A B = - a", "a,b,=,-,A", "AB=-A", " A\nB\t=, - A "])
def test_signs_are_read_whatever_stands_between_them(text):
    assert parse_ratings(text, 5) == ["A", "B", "tie", None, "A"]


def test_all_wrong_signs_are_named_with_their_places():
    with pytest.raises(ConfigError) as raised:
        parse_ratings("A X = ; B", 4)
    assert str(raised.value).splitlines() == [
        "3 problems in the ratings",
        "  rating 2 is 'X': A or B for the better answer, = for a tie, - to skip.",
        "  rating 4 is ';': A or B for the better answer, = for a tie, - to skip.",
        "  5 ratings are given, and 4 pairs are shown.",
    ]


# What is shown


def test_without_ratings_the_pairs_are_shown_and_nothing_is_written(project, capsys):
    rated = rate_answers(evaluation(), pairs=3)
    assert len(rated.shown) == 3 and rated.result is None and "Write a sign for each pair" in rated.note
    assert not list(project.iterdir())
    out = capsys.readouterr().out
    assert "Pair 3: question" in out and "[B]" in out and "A or B for the better answer" in out


def test_no_page_tells_which_model_an_answer_is_of(capsys):
    signs = " ".join(sides())
    for rated in (rate_answers(evaluation()), rate_answers(evaluation(), signs[:9])):
        page = rated._repr_html_() + capsys.readouterr().out
        assert not any(name in page for name in ("teacher", "system1", "Teacher", "Secret", "secret-folder", "c1"))
        assert json.dumps(rated.shown).count("teacher") == 0


def test_which_answer_is_a_follows_the_seed_and_not_the_number_of_pairs():
    ten = rate_answers(evaluation()).shown
    assert rate_answers(evaluation()).shown == ten and rate_answers(evaluation(), pairs=4).shown == ten[:4]
    assert rate_answers(evaluation(), seed=1).shown != ten and {"A", "B"} == set(sides())


def test_hostile_texts_are_letters_on_the_page():
    hostile = "<script>alert(1)</script><img src=x onerror=alert(1)>\u202e\x1b[31m</div>"
    given = evaluation([(f"<think>\n{hostile}\n</think>\n\n{hostile}", hostile + "x" * 100_000)])
    given["systems"]["system1"]["cases"][0]["instruction"] = hostile
    page = rate_answers(given)._repr_html_()
    assert "<script" not in page and "<img" not in page and "\u202e" not in page and "\x1b" not in page
    assert page.count("&lt;script&gt;") == 4 and page.count("<div") == page.count("</div>")


def test_reasoning_is_folded_and_an_empty_answer_is_said():
    page = rate_answers(evaluation([("<think>\nlong thought\n</think>\n\nbig", " ")]))._repr_html_()
    assert page.count("<details>") == 1 and page.index("<summary>") < page.index("long thought") and "(no answer)" in page


def test_equal_answers_are_not_shown():
    given = evaluation([("same", "same "), ("big", "small")])
    assert len(rate_answers(given).shown) == 1
    with pytest.raises(DataError, match="There is nothing to rate: .* to all 1 questions"):
        rate_answers(evaluation([("same", "same")]))


# What is kept


def test_ratings_are_kept_with_whose_answers_they_were_of(capsys):
    student = sides()
    signs = [student[0], other(student[1]), "=", "-", *student[4:]]
    rated = rate_answers(evaluation(), " ".join(signs))
    found = kept()
    assert [one["verdict"] for one in found["ratings"]] == ["student", "teacher", "tie", *["student"] * 6]
    assert found["n"] == 9 and found["student"] == wilson(7, 9) and found["preferred"] == wilson(7, 8) and found["tie"] == wilson(1, 9)
    first = found["ratings"][0]
    assert {first["A"], first["B"]} == {"student", "teacher"} and first[student[0]] == "student" and first["time"][:2] == "20"
    assert found["models"]["student"] == "secret-folder/system1" and found["agreement"] is None
    assert [page["number"] for page in rated.shown] == [4] and "87.5%" in rated._repr_html_() and "87.5%" in capsys.readouterr().out


def test_no_result_is_told_before_each_pair_has_a_sign_and_every_sign_is_kept(capsys):
    student = sides(4)
    capsys.readouterr()
    rated = rate_answers(evaluation(), f"{student[0]} - {student[2]}", pairs=4)
    page = rated._repr_html_() + capsys.readouterr().out
    assert rated.result is None and "2 rated, 1 left" in rated.note and rated.note in page and "%" not in page.replace("100%", "")
    assert [page["number"] for page in rated.shown] == [2, 4] and kept()["n"] == 2
    done = rate_answers(evaluation(), f"{student[0]} - {student[2]} =", pairs=4)
    assert done.result["n"] == 3 and done.result["preferred"] == wilson(2, 2) and [page["number"] for page in done.shown] == [2]


def test_a_second_call_adds_replaces_and_takes_back():
    student = sides()
    rate_answers(evaluation(), f"{student[0]} {student[1]} {student[2]}")
    times = {one["id"]: one["time"] for one in kept()["ratings"]}
    rate_answers(evaluation(), f"{student[0]} {other(student[1])} - =")
    assert [one["verdict"] for one in kept()["ratings"]] == ["student", "teacher", "tie"]
    assert kept()["ratings"][0]["time"] == times[kept()["ratings"][0]["id"]]
    rate_answers(evaluation(), student[0])
    assert kept()["n"] == 3
    rate_answers(evaluation(), "= " * 12, pairs=12)
    assert kept()["n"] == 12 and kept()["tie"]["value"] == 1


def test_ratings_of_other_answers_are_refused_and_stay(project):
    rate_answers(evaluation(), "A B")
    before = kept()
    changed = evaluation([("big", "small"), ("big", "smaller")])
    with pytest.raises(ConfigError, match=r"reports/ratings.json holds 2 ratings of other answers \(system1\): a sign belongs to the pair"):
        rate_answers(changed, "A")
    assert kept() == before
    rate_answers(changed, "A", out="reports/second.json")
    assert kept("reports/second.json")["n"] == 1
    store.write_json("other.json", {"a": 1})
    with pytest.raises(ConfigError, match="other.json holds no ratings"):
        rate_answers(changed, "A", out="other.json")


def test_an_evaluation_can_be_an_object_or_a_file():
    class Evaluation:
        def to_dict(self):
            return evaluation()

    store.write_json("report.json", evaluation())
    assert rate_answers("report.json").shown == rate_answers(Evaluation()).shown == rate_answers(evaluation()).shown


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"pairs": 0}, ConfigError, "pairs = 0: give a whole number above 0"),
        ({"mode": "system2"}, ConfigError, "mode = 'system2': was not evaluated, only system1"),
        ({"ratings": "A", "preference": {"a": 1}}, DataError, "This is no preference of the lab"),
        ({"ratings": "A", "preference": "none.json"}, DataError, "none.json does not exist"),
    ],
)
def test_what_cannot_be_rated_is_refused(settings, error, said, project):
    with pytest.raises(error, match=said):
        rate_answers(evaluation(), **settings)
    assert not list(project.iterdir())


# Agreement with the judge


def judged(verdicts: list[str | None]) -> dict:
    """A preference of the shown pairs, in their order."""
    by_question = {pair["instruction"]: pair for pair in pairs_of(evaluation())["pairs"]}
    shown = [by_question[page["question"]] for page in rate_answers(evaluation(), pairs=12).shown]
    return {"judge": "gpt", "pairs": [{"sha256": pair_hash(p), "verdict": v} for p, v in zip(shown, verdicts, strict=False)]}


def test_agreement_is_over_the_pairs_that_both_rated():
    student = sides(12)
    own = [*student[:4], *map(other, student[4:7]), "=", "-", student[9]]
    # both: 4 × student, 3 × teacher, 1 × tie; the judge: s s s t | t t s | tie, silent on the tenth
    said = judged(["student", "student", "student", "teacher", "teacher", "teacher", "student", "tie", "tie", None])
    store.write_json(rating.JUDGED, said)
    rated = rate_answers(evaluation(), " ".join(own))
    found = kept()["agreement"]
    # observed 6/8; chance (4·4 + 3·3 + 1·1) / 64 = 26/64; kappa = (48 − 26) / (64 − 26)
    assert found == {"judge": "gpt", **wilson(6, 8), "kappa": pytest.approx(22 / 38)}
    assert "gpt agrees on 75.0% of 8 pairs" in rated._repr_html_() and "kappa 0.58" in rated._repr_html_()
    rate_answers(evaluation(), " ".join(own), preference=judged(["student"] * 3))
    assert kept()["agreement"] == {"judge": "gpt", **wilson(3, 3), "kappa": None}


def test_a_judge_of_other_answers_does_not_count():
    rate_answers(evaluation(), "A B", preference={"judge": "gpt", "pairs": [{"sha256": "0" * 64, "verdict": "tie"}]})
    assert kept()["agreement"] is None


def test_kappa_is_that_of_the_worked_example():
    # the usual table of two raters: 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no; kappa 0.4
    both = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    assert kappa(both) == pytest.approx(0.4)
    assert kappa([("y", "y"), ("n", "n")]) == 1 and kappa([("y", "n"), ("n", "y")]) == -1
    assert kappa([("y", "y")] * 3) is None and kappa([("y", "y"), ("y", "n")]) == 0
