"""The report of an evaluation: what its pages say, that hostile texts stay texts, and how it looks and works in a real browser."""

import importlib.util
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import report_sample

from distill import plots, report, report_markdown, report_page, report_words
from distill.console import visible

FIRST_VIEW = re.compile(r"<article.*?<nav", re.DOTALL)
VOID = {"meta", "br", "link", "img", "input"}


@pytest.fixture(scope="module", params=report_sample.VARIANTS)
def facts(request) -> dict:
    return report_sample.VARIANTS[request.param]()


@pytest.fixture(scope="module")
def whole() -> dict:
    return report_sample.evaluation()


@pytest.fixture(scope="module")
def page(whole) -> str:
    return report_page.page(whole)


class Outline(HTMLParser):
    """A page's tags, attributes and text as a browser would see them; raises where tags do not nest."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes what it did not open"

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


# What it says


def test_the_first_view_says_what_how_good_how_fast_and_at_what_cost(page):
    first = Outline(FIRST_VIEW.search(page)[0].removesuffix("<nav") + "</article>").text
    for said in ("data/micro/teacher", "1.69 M", "0.66 M", "99.3%", "of the teacher's exact match", "n\u00a0=\u00a0140", "95%: 98.1–100.0"):
        assert said in first
    for said in ("3.33 ×", "teacher 8-bit", "0.203 s", "1 min 25 s", "9,405 rows", "2.5 MiB", "46.1% more", "61.0% fewer parameters"):
        assert said in first
    assert "7 of 9 targets met, 1 not met, 1 not measured" in first


def test_verdicts_are_said_by_words_and_signs(page):
    assert all(said in page for said in ("✓ met", "✗ not met", "○ not measured", "✓ correct", "✗ wrong"))


def test_a_broken_student_is_called_out_before_its_figures(page):
    for text in (report_page.page(report_sample.broken()), report_markdown.markdown(report_sample.broken())):
        student = text[text.index("System-2 student") :]
        assert student.index("This student is broken: 2 faults") < student.index("Quality kept")
        assert "The answers do not stop by themselves" in text
    assert "broken" not in page


def test_every_variant_makes_whole_pages(facts):
    outline = Outline(report_page.page(facts))
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {attributes["href"].removeprefix("#") for tag, attributes in outline.tags if tag == "a"}
    assert links <= set(ids)
    levels = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert "None" not in outline.text and "nan" not in outline.text.split()
    assert "None" not in report_markdown.markdown(facts)


def test_tables_have_captions_and_scopes(page):
    tags = Outline(page).tags
    count = [tag for tag, _ in tags].count("table")
    assert count == [tag for tag, _ in tags].count("caption") > 8
    assert all("scope" in attributes for tag, attributes in tags if tag == "th")


def test_what_was_not_measured_is_left_out_or_said():
    without = report_page.page(report_sample.without_speed())
    assert "Speed was not measured: not asked for (--no-speed)." in without and "Quality against speed" not in without
    nothing = report_page.page(report_sample.unmeasured())
    assert "not checked: no run record there" in nothing and "whether training had seen them was not checked" in nothing
    assert not {"Loss over training", "RV and CD", "Calibration"} & set(Outline(nothing).words)
    alone = report_sample.one_system() | {"extras": []}
    assert not {"System 1", "System-1 student"} & set(Outline(report_page.page(alone)).words)


def test_pages_show_the_most_different_cases_and_how_many_there_are(whole, page):
    assert "20 of 140 questions" in page and page.count('class="case"') == 2 * report_page.CASES
    text = report_markdown.markdown(whole)
    assert "5 of 140 questions" in text and text.count("\n#### ") == 2 * report_markdown.CASES
    assert text.index("count\\_even:477,212") < text.index("reverse:964,297")


def test_judge_and_ratings_stand_in_the_report(whole):
    judged = {"judge": "judge-model", "n": 60, "student": report_sample._share(6, 60), "preferred": {"value": None, "n": 0, "ci": None}}
    text = Outline(report_page.page({**whole, "judge": {"system1": judged}})).text
    assert "Pairs judged by a model" in text and "the student's is better" in text and "4.7–20.1" in text and "judge-model" in text


def test_the_json_is_the_evaluation(whole, tmp_path):
    paths = report.Evaluation(whole).save(tmp_path)
    assert json.loads(Path(paths["json"]).read_text(encoding="utf-8")) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]
    assert Path(paths["html"]).stat().st_size < 500_000


def test_pages_are_the_same_twice(page):
    assert page == report_page.page(report_sample.evaluation())


def test_the_notebook_gets_the_fragment_and_the_terminal_the_figures(whole, capsys):
    shown = report.Evaluation(whole)
    fragment = shown._repr_html_()
    assert fragment.startswith("<article") and "<html" not in fragment
    shown.show()
    said = capsys.readouterr().out
    assert "99.3%" in said and "7 of 9 targets met" in said and "distilled-micro-cot" in said


def test_styles_touch_nothing_outside_the_report(whole):
    rules = re.findall(r"([^{}]+)\{", re.sub(r"@media[^{]*", "", report_page._style()))
    selectors = [rule for rule in rules if rule.strip()]
    assert len(selectors) > 50 and all(rule.strip().startswith(".lab-report") for rule in selectors)
    assert all(".lab-report" in part for rule in selectors for part in re.sub(r"\([^)]*\)", "", rule).split(","))


# Numbers


@pytest.mark.parametrize(
    ("value", "kind", "text", "detail"),
    [
        ({"value": 0.986, "n": 100, "ci": [0.9741, 0.9966]}, "share", "98.6%", "97.4–99.7"),
        ({"value": 0.0, "n": 100, "ci": [-0.01, 0.01]}, "share", "0.0%", "−1.0 to 1.0"),
        ({"value": 712.4, "n": 100, "ci": None}, "number", "712", ""),
        ({"value": 1.042, "n": 100, "ci": [1.03, 1.05]}, "number", "1.04", "1.03–1.05"),
        ({"value": 0.0, "n": 3, "ci": None}, "number", "0", ""),
        ({"value": 5.156, "n": 20, "ci": [5.1, 5.21]}, "times", "5.16 ×", "5.10–5.21"),
        ({"value": None, "n": 0, "ci": None}, "share", "–", ""),
        (None, "share", "–", ""),
    ],
)
def test_numbers_are_written_with_their_intervals(value, kind, text, detail):
    cell = report_words.measured(value, kind)
    assert (cell.text, cell.detail) == (text, detail)


def test_sizes_and_times_are_written_in_units_that_one_reads():
    assert [report_words.parameters(number) for number in (657_024, 494_032_768, 7_615_616_512)] == ["0.66 M", "494 M", "7.62 B"]
    assert [report_words.duration(seconds) for seconds in (0.25, 59.6, 85.2, 12_000)] == ["0.25 s", "59.6 s", "1 min 25 s", "3 h 20 min"]
    assert [report_words.memory(number) for number in (None, 2_628_096, 8 * 2**30)] == ["–", "2.5 MiB", "8.00 GiB"]
    assert [report_words.saved(share) for share in (0.61, -0.461)] == ["61.0% less", "46.1% more"]
    lost = report_words.difference({"value": -0.014, "n": 9, "ci": [-0.025, 0.003], "p": 0.0301}, "share")
    assert (lost.text, lost.detail) == ("−1.4", "−2.5 to 0.3, p = 0.03")


def test_lengths_fall_into_groups_of_about_one_size():
    bins = plots.length_bins([(tokens, tokens < 50) for tokens in range(100)])
    assert [part["n"] for part in bins] == [20] * 5 and [part["right"] for part in bins] == [20, 20, 10, 0, 0]
    assert [part["n"] for part in plots.length_bins([(7, True)] * 40)] == [40]
    assert plots.length_bins([]) == []


# Plots


def test_plots_say_in_numbers_what_they_show(page):
    drawn = re.findall(r'<svg class="plot" role="img".*?</svg>', page, re.DOTALL)
    assert len(drawn) == 6
    assert all(re.search(r"<title>[^<]+</title><desc>[^<]*\d[^<]*</desc>", each) for each in drawn)
    assert "RV 1, CD 2: 922 rows" in page and "System 2, student: 615 tokens/s, 98.3%" in page


def test_plots_take_their_colours_from_the_page(page):
    for each in re.findall(r'<svg class="plot".*?</svg>', page, re.DOTALL):
        assert "currentColor" in each and "var(--lab-" in each
        assert not re.search(r"(?<!, )#[0-9a-f]{6}\b", re.sub(r"(href=\"|url\()#", "", each))


def test_a_plot_reads_no_formula_in_a_name_and_is_the_same_in_any_style():
    import matplotlib

    series = [plots.Series("system1", "$x^2$ & <b>", {"training": [[1, 2.0], [2, 0.5]], "validation": []})]
    drawn = plots.loss(series)
    assert "$x^2$ &amp; &lt;b&gt;" in drawn.svg and "<b>" not in drawn.svg
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30}):
        assert plots.loss(series) == drawn


# Hostile texts


def test_html_shows_hostile_text_as_text():
    text = report_page.page(report_sample.hostile())
    outline = Outline(text)
    assert not {"script", "img", "iframe", "object", "form", "link"} & {tag for tag, _ in outline.tags}
    assert not any(name.startswith("on") or name == "src" for _, attributes in outline.tags for name in attributes)
    assert all(attributes["href"].startswith("#") for _, attributes in outline.tags if "href" in attributes)
    assert report_sample.HOSTILE[0] in outline.text and text.count("</style>") == 2
    assert visible(text) == text and "96,000 more characters" in text and len(text) < 500_000


def test_markdown_shows_hostile_text_as_text():
    text = report_markdown.markdown(report_sample.hostile())
    assert visible(text) == text and "96,000 more characters" in text
    outside = re.sub(r"^(`{3,})text\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"(?<!\\)(<script|<img|<!--|\]\(|\{\{)", outside) and "\n# no heading" not in outside
    widths = {}
    for line in outside.splitlines():
        if line.startswith("|"):
            widths.setdefault(len(widths) if not widths else max(widths), []).append(len(re.findall(r"(?<!\\)\|", line)))
        elif widths.get(max(widths, default=0)):
            assert len(set(widths[max(widths)])) == 1, "a cell has broken out of its table"
            widths[max(widths) + 1] = []


def test_the_terminal_shows_hostile_text_as_text(capsys):
    report.Evaluation(report_sample.hostile()).show()
    said = capsys.readouterr().out
    assert "<script>" in said and visible(said) == said


def test_the_page_may_load_and_run_nothing(page):
    assert "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">" in page
    assert '<html lang="en">' in page and "<main>" in page
    assert not re.search(r"https?://(?!www\.w3\.org)|@import|<script", page)


# In a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium; a skip with its reason where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture(scope="module")
def opened(browser, tmp_path_factory):
    """Opens a variant's report: returns the page and what went wrong or was asked for while it was read."""
    folder = tmp_path_factory.mktemp("reports")

    def opens(variant: str, scheme: str, width: int, *, policy: bool = True):
        file = folder / f"{variant}.html"
        if not file.exists():
            file.write_text(report_page.page(report_sample.VARIANTS[variant]()), encoding="utf-8")
        shown = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=not policy)
        trouble = []
        shown.on("console", lambda said: trouble.append(said.text))
        shown.on("pageerror", lambda error: trouble.append(str(error)))
        shown.on("dialog", lambda dialog: trouble.append(dialog.message))
        shown.on("request", lambda request: trouble.append(request.url) if request.url != file.as_uri() else None)
        shown.goto(file.as_uri())
        return shown, trouble

    return opens


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("variant", ["both", "broken", "hostile"])
def test_a_browser_finds_no_fault(opened, variant, scheme, width):
    axe = importlib.util.find_spec("axe_playwright_python")
    if not axe:
        pytest.skip("axe_playwright_python is not installed")
    # without the page's policy axe can run, and so could whatever hostile text became a script
    shown, trouble = opened(variant, scheme, width, policy=False)
    shown.evaluate("document.querySelectorAll('details').forEach(folded => folded.open = true)")
    assert shown.evaluate("document.scrollingElement.scrollWidth <= innerWidth"), "the page is wider than the window"
    shown.add_script_tag(path=Path(axe.origin).parent / "axe.min.js")
    found = shown.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
    serious = {
        each["id"]: [node["html"][:120] for node in each["nodes"][:3]] for each in found if each["impact"] in ("serious", "critical")
    }
    shown.close()
    assert not serious
    assert not trouble


@pytest.mark.slow
def test_print_is_light_and_unfolded(opened):
    shown, trouble = opened("both", "dark", 1400)
    shown.emulate_media(media="print", color_scheme="dark")
    assert shown.evaluate("getComputedStyle(document.querySelector('.lab-report')).backgroundColor") == "rgb(255, 255, 255)"
    settings = "[...document.querySelectorAll('summary')].find(each => each.innerText.includes('setting')).parentElement"
    assert shown.evaluate(f"{settings}.querySelector('table').checkVisibility({{contentVisibilityAuto: true}})")
    assert not trouble
    shown.close()


# Plain text in Markdown


@pytest.mark.parametrize(
    "text",
    ["- item", "+ item", "* item", "1. item", "12) item", "-", "- - -", "===", "# head", "> quote", "~~~", "```", "    code", "1."]
    + ["<b>x</b>", "&lt;", "a | b", "[x](y)", "![x](y)", "_x_ a_b_c", "x\\", "12:30 -5 1.5", "| - |", "a\n===", "[x]: http://y"],
)
def test_plain_text_is_rendered_as_its_own_letters(text):
    import html

    from markdown_it import MarkdownIt

    from distill.markdown import plain

    for before in ("", "a paragraph\n"):
        rendered = MarkdownIt("commonmark").enable("table").render(before + plain(text))
        assert html.unescape(rendered) == f"<p>{before}{' '.join(text.split())}</p>\n"


def test_an_address_or_a_mention_is_no_link_in_plain_text():
    from distill.markdown import plain

    said = plain("https://x.example WWW.x.example @user :tada: #1 12:30 a: b")
    assert said == r"https\://x.example WWW\.x.example \@user \:tada: \#1 12:30 a: b"
