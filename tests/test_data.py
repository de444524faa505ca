"""Sources → rows: the schema, the slices, the mixture, the split; bad input is one message and no file; a kill tears nothing."""

import json
import random
import signal
import time
from collections import Counter

import pytest

from distill import data, store
from distill.data import check_labeled, prepare_system1_dataset, write_tokenized
from distill.errors import ConfigError, DataError
from distill.prompt import asked_ids
from distill.sources import Source, _streamed, mix, stream

ROW_FILES = ("labeled.json", "labeled_validation.json", "instructions.json", "instructions_validation.json")
OUTPUTS = (*ROW_FILES, "labeled.json.manifest.json", "instructions.json.manifest.json")


@pytest.fixture
def prepare(project):
    """`prepare_system1_dataset` with its files in the project's folder `out`, and no validation unless asked for."""

    def run(slice_str="train", *, source="rows.jsonl", **settings):
        settings = {"validation": 0, "out_instructions": "out/instructions.json", "out_labeled": "out/labeled.json", **settings}
        return prepare_system1_dataset(slice_str, source=source, **settings)

    return run


def numbered(count, start=0, **more):
    return [{"instruction": f"question {number}", "output": f"answer {number}", **more} for number in range(start, start + count)]


def labeled(project, name="out/labeled.json"):
    return list(store.read_rows(project / name))


def instructions_of(rows):
    return [row["instruction"] for row in rows]


# Rows


def test_a_row_has_the_labs_schema_with_its_input_folded_in(project, prepare):
    store.write_jsonl("rows.jsonl", [{"instruction": " Add. ", "input": "2 and 2\n", "output": " 4 ", "other": [1]}])
    prepare()
    (row,) = labeled(project)
    row_id = row.pop("id")
    assert row == {"instruction": "Add.\n\n2 and 2", "input": "", "output": "4", "source": "rows.jsonl"}
    assert len(row_id) == 16 and set(row_id) <= set("0123456789abcdef")
    (asked,) = labeled(project, "out/instructions.json")
    assert asked == {"id": row_id, "instruction": "Add.\n\n2 and 2", "input": "", "source": "rows.jsonl"}


def test_columns_of_other_names_are_mapped_once(project, prepare):
    store.write_json("rows.json", [{"question": "Q", "context": "C", "answer": "A", "output": "not this one"}])
    prepare(source="rows.json", columns={"instruction": "question", "input": "context", "output": "answer"})
    assert [(row["instruction"], row["output"]) for row in labeled(project)] == [("Q\n\nC", "A")]


def test_an_id_is_that_of_instruction_and_input_and_of_nothing_else(project, prepare):
    base = {"instruction": "a", "input": "b", "output": "x"}
    rows = [base, base | {"instruction": "a b", "input": ""}, base | {"input": "c"}, base | {"instruction": "ab", "input": ""}]
    store.write_jsonl("rows.jsonl", rows)
    prepare()
    ids = [row["id"] for row in labeled(project)]
    assert len(set(ids)) == 4
    store.write_jsonl("rows.jsonl", [base | {"output": "y", "instruction": " a\n", "more": 1}])
    prepare()
    assert [row["id"] for row in labeled(project)] == ids[:1]


def test_duplicates_are_merged_into_the_first_and_counted(project, prepare):
    store.write_jsonl("rows.jsonl", [*numbered(3), *[row | {"output": "another"} for row in numbered(3)], *numbered(1, start=9)])
    prepared = prepare()
    assert (prepared.read, prepared.kept, prepared.dropped) == (7, 4, {"the same question as an earlier row": 3})
    assert [row["output"] for row in labeled(project)] == ["answer 0", "answer 1", "answer 2", "answer 9"]


def test_a_preparation_says_whose_the_labels_are(project, prepare, capsys):
    store.write_jsonl("rows.jsonl", numbered(4))
    prepared = prepare(validation=0.5)
    assert prepared.teachers == {"whoever wrote rows.jsonl": 4}
    assert "labels by: whoever wrote rows.jsonl (100%)\n  (not by the teacher of the comparison, unless" in capsys.readouterr().out


def test_every_dropped_row_is_counted_with_its_reason(project, prepare):
    bad = [
        {"instruction": "", "output": "x"},
        {"instruction": " \n", "output": "x"},
        {"output": "x"},
        {"instruction": None, "output": "x"},
        {"instruction": "a"},
        {"instruction": "b", "output": "  "},
        {"instruction": 5, "output": "x"},
        {"instruction": "c", "output": ["x"]},
        {"instruction": "d", "input": {"a": 1}, "output": "x"},
        {"instruction": "e\ud800", "output": "x"},
        {"instruction": "f", "output": "\udfff"},
    ]
    (project / "rows.jsonl").write_text(
        "\n".join(map(json.dumps, [*numbered(1), *bad, {"instruction": "g", "input": None, "output": "kept"}]))
    )
    prepared = prepare()
    assert (prepared.read, prepared.kept) == (13, 2)
    assert prepared.dropped == {
        "no instruction": 4,
        "no output": 2,
        "instruction that is no text": 1,
        "output that is no text": 1,
        "input that is no text": 1,
        "instruction that is no valid Unicode": 1,
        "output that is no valid Unicode": 1,
    }
    assert "dropped 4: no instruction" in str(prepared)


def test_hostile_text_is_kept_to_the_letter(project, prepare):
    texts = [
        "<|im_end|>\n<|im_start|>system",
        "{{ 7*7 }}",
        "NUL \x00 inside",
        "\u2028 separators \x85",
        "שלום 👩‍👩‍👧",
        "[bold]markup[/bold]",
    ]
    store.write_jsonl("rows.jsonl", [{"instruction": f"x{text}x", "output": f"y{text}y"} for text in texts])
    prepare()
    assert [(row["instruction"], row["output"]) for row in labeled(project)] == [(f"x{text}x", f"y{text}y") for text in texts]


# Slices

TEN = [f"question {number}" for number in range(10)]
SLICES = {
    "train": TEN,
    "train[:]": TEN,
    "train[:3]": TEN[:3],
    "train[3:]": TEN[3:],
    "train[2:5]": TEN[2:5],
    "train[:20%]": TEN[:2],
    "train[10%:35%]": TEN[1:4],
    "train[-3:]": TEN[-3:],
    "train[:-3]": TEN[:-3],
    "train[-20%:]": TEN[-2:],
    "train[-100:2]": TEN[:2],
    "train[7:1000]": TEN[7:],
    "train[:300%]": TEN,
    "train[:999999999999999]": TEN,
    "train[:0]": [],
    "train[5:5]": [],
    "train[6:2]": [],
    "train[10:]": [],
    "train[999999999999999:]": [],
    "train[50%:20%]": [],
}


@pytest.fixture(params=["rows.json", "rows.jsonl", "rows.parquet", "folder of json", "folder of parquet"])
def ten_rows(request, project):
    """Ten rows in each kind of local source; a folder has them in two files."""
    name, rows = request.param, numbered(10)
    writers = {"json": store.write_json, "jsonl": store.write_jsonl, "parquet": store.write_parquet}
    if name.startswith("rows."):
        writers[name.partition(".")[2]](name, rows)
    elif name == "folder of json":
        store.write_jsonl(f"{name}/a.jsonl", rows[:4])
        store.write_json(f"{name}/b/c.json", rows[4:])
    else:
        store.write_parquet(f"{name}/a.parquet", rows[:4])
        store.write_parquet(f"{name}/b/c.parquet", rows[4:])
    return name


def test_a_slice_means_the_same_rows_in_every_kind_of_source(ten_rows):
    got = {text: instructions_of(stream(Source(ten_rows, {}, 1.0, text))) for text in SLICES}
    assert got == SLICES


def test_a_slice_of_a_stream_means_the_same_rows(project):
    """The hub's way in, with a local folder in the hub's place: `datasets` streams both alike."""
    store.write_parquet("folder/a.parquet", numbered(4))
    store.write_parquet("folder/b.parquet", numbered(6, start=4))
    marks = {
        ("2", "5"): TEN[2:5],
        ("10%", "35%"): TEN[1:4],
        ("-3", None): TEN[-3:],
        ("6", "2"): [],
        (None, "0"): [],
        ("9", "1000"): TEN[9:],
    }
    for (start, stop), wanted in marks.items():
        assert instructions_of(_streamed(str(project / "folder"), None, "train", start, stop)) == wanted
    with pytest.raises(DataError, match="folder cannot be read: ValueError: .*test"):
        list(_streamed(str(project / "folder"), None, "test", None, None))


def test_files_before_a_slice_of_a_stream_are_not_fetched(project):
    """The rows of the first two files are destroyed, their footers left: a slice behind them is read all the same."""
    for number, name in enumerate("abc"):
        store.write_parquet(f"folder/{name}.parquet", numbered(4, start=4 * number))
    for name in "ab":
        file = project / "folder" / f"{name}.parquet"
        content = file.read_bytes()
        footer = 8 + int.from_bytes(content[-8:-4], "little")
        file.write_bytes(content[:4] + b"\xff" * (len(content) - 4 - footer) + content[-footer:])
    assert instructions_of(_streamed(str(project / "folder"), None, "train", "9", None)) == ["question 9", "question 10", "question 11"]
    assert instructions_of(_streamed(str(project / "folder"), None, "train", "-2", "11")) == ["question 10"]
    assert instructions_of(_streamed(str(project / "folder"), None, "train", "12", None)) == []
    assert instructions_of(_streamed(str(project / "folder"), None, "train", "90%", None)) == ["question 11"]
    with pytest.raises(DataError, match="folder cannot be read"):
        list(_streamed(str(project / "folder"), None, "train", "7", None))


def test_a_local_file_is_read_without_the_datasets_library_and_so_without_the_network(project, start_python):
    store.write_parquet("rows.parquet", numbered(3))
    code = """
from distill.sources import Source, stream
assert len(list(stream(Source("rows.parquet", {}, 1.0, "train[:2]")))) == 2
print([name for name in ("datasets", "torch", "transformers") if name in sys.modules])
"""
    output, errors = start_python(code).communicate(timeout=60)
    assert output == "[]\n", errors


@pytest.mark.parametrize("name", ["a [strange]* folder?/rows.parquet", "[b]/{c}/rows.jsonl", "é 漢 %20#/rows.parquet"])
def test_a_path_with_strange_letters_is_read_like_any_other(project, name):
    (store.write_parquet if name.endswith("t") else store.write_jsonl)(name, numbered(3))
    assert instructions_of(stream(Source(name, {}, 1.0, "train[1:]"))) == TEN[1:3]
    assert instructions_of(stream(Source(str((project / name).parent), {}, 1.0, "train[-2:]"))) == TEN[1:3]


def test_a_slice_of_a_share_is_the_one_that_datasets_itself_would_take(project):
    from datasets import Dataset, ReadInstruction

    rows = Dataset.from_list(numbered(7))
    store.write_jsonl("rows.jsonl", numbered(7))
    for text in ("train[:10%]", "train[10%:50%]", "train[33%:67%]", "train[-40%:]", "train[:99%]"):
        (wanted,) = ReadInstruction.from_spec(text).to_absolute({"train": len(rows)})
        assert instructions_of(stream(Source("rows.jsonl", {}, 1.0, text))) == rows["instruction"][wanted.from_ : wanted.to], text


@pytest.mark.parametrize(
    "text",
    ["", "train[", "train[1]", "train[:5", "train[a:b]", "train[:5.5]", "train [:5]", "train+test", "train[:9999999999999999]", 5, None],
)
def test_what_is_no_slice_is_a_config_error_that_shows_how(project, prepare, text):
    store.write_jsonl("rows.jsonl", numbered(3))
    with pytest.raises(ConfigError, match=r"write train, train\[:1000\]"):
        prepare(text)
    assert not (project / "out").exists()


def test_rows_says_how_many_to_keep_and_reading_stops_there(project, prepare):
    rows = [*numbered(2), *numbered(2), *numbered(50, start=2)]
    (project / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\nnonsense that is never reached")
    prepared = prepare(rows=5, validation=0.2)
    assert (prepared.read, prepared.kept, prepared.validation) == (7, 4, 1)


# Mixtures


def test_a_mixture_keeps_its_shares_and_ends_when_a_source_is_used_up(project):
    store.write_jsonl("a.jsonl", numbered(3_000))
    store.write_jsonl("b.jsonl", numbered(2_000, start=5_000))
    sources = [Source("a.jsonl", {}, 3.0, "train"), Source("b.jsonl", {}, 1.0, "train")]
    drawn = [(source.name, row["instruction"]) for source, row in mix(sources, seed=1)]
    counts = Counter(name for name, _ in drawn)
    assert counts["a.jsonl"] == 3_000
    assert 0.22 < counts["b.jsonl"] / len(drawn) < 0.28
    in_order = [text for name, text in drawn if name == "b.jsonl"]
    assert in_order == [f"question {number}" for number in range(5_000, 5_000 + len(in_order))]


def test_a_mixture_is_the_same_for_a_seed_and_another_for_another(project, prepare):
    store.write_jsonl("a.jsonl", numbered(100))
    store.write_jsonl("b.jsonl", [{"q": f"other {number}", "a": "x"} for number in range(100)])
    source = ["a.jsonl", {"source": "b.jsonl", "columns": {"instruction": "q", "output": "a"}, "weight": 2, "slice": "train[:50]"}]
    texts = []
    for seed in (1, 1, 2):
        prepare(source=source, seed=seed)
        texts.append((project / "out/labeled.json").read_bytes())
    assert texts[0] == texts[1] != texts[2]
    assert {row["source"] for row in labeled(project)} == {"a.jsonl", "b.jsonl"}


def test_all_problems_of_a_mixture_are_named_at_once(project, prepare):
    entries = [
        {"sorce": "a"},
        {"source": "a", "weight": 0},
        {"source": "a", "weight": float("nan")},
        {"source": "a", "columns": {"outptu": "x"}},
    ]
    with pytest.raises(ConfigError) as caught:
        prepare(source=entries)
    for words in (
        "source 0: sorce: no such key. Did you mean source?",
        "source 0: names no",
        "source 1: weight = 0",
        "source 2: weight = nan",
    ):
        assert words in str(caught.value)
    assert "source 3: columns.outptu: a row has no such field. Did you mean output?" in str(caught.value)
    for wrong in ([], [{"source": ""}], "", [{"source": "a", "columns": "question"}], [{"source": "a", "weight": True}]):
        with pytest.raises(ConfigError, match="in source"):
            prepare(source=wrong)
    assert list(project.iterdir()) == []


def test_each_source_of_a_mixture_needs_its_own_columns(project, prepare):
    store.write_jsonl("a.jsonl", numbered(50))
    mixture = ["a.jsonl", {"source": "a.jsonl", "columns": {"instruction": "question"}}]
    for order in (mixture, mixture[::-1]):
        with pytest.raises(DataError, match="a.jsonl has no column 'question'; it has 'instruction', 'output'"):
            prepare(source=order)


# The validation split


def split(project):
    return [{row["id"] for row in labeled(project, name)} for name in ("out/labeled.json", "out/labeled_validation.json")]


@pytest.mark.parametrize(
    ("count", "share", "size"), [(100, 0.05, 5), (100, 0.5, 50), (103, 0.1, 10), (10, 0.01, 1), (2, 0.05, 1), (3, 0.5, 2)]
)
def test_the_validation_split_has_its_exact_size_and_shares_no_row(project, prepare, count, share, size):
    store.write_jsonl("rows.jsonl", numbered(count))
    prepared = prepare(validation=share)
    train, validation = split(project)
    assert (len(train), len(validation)) == (prepared.kept, prepared.validation) == (count - size, size)
    assert not train & validation
    assert instructions_of(labeled(project, "out/instructions_validation.json")) == instructions_of(
        labeled(project, "out/labeled_validation.json")
    )


def test_the_validation_split_goes_by_id_whatever_the_order_of_rows_and_changes_with_the_seed(project, prepare):
    rows, splits = numbered(200), []
    for shuffle, seed in ((0, 7), (1, 7), (2, 8)):
        random.Random(shuffle).shuffle(rows)
        store.write_jsonl("rows.jsonl", rows)
        prepare(validation=0.1, seed=seed)
        splits.append(split(project))
    assert splits[0] == splits[1]
    assert splits[0][1] != splits[2][1]


def test_the_training_rows_keep_the_order_of_the_source(project, prepare):
    store.write_jsonl("rows.jsonl", numbered(50))
    prepare(validation=0.2)
    texts = instructions_of(labeled(project))
    assert texts == sorted(texts, key=lambda text: int(text.split()[1]))


def test_one_row_is_trained_on_and_not_split_off(project, prepare):
    store.write_jsonl("rows.jsonl", numbered(1))
    prepared = prepare(validation=0.5)
    assert (prepared.kept, prepared.validation, prepared.validation_path) == (1, 0, None)


def test_preparing_without_validation_removes_the_split_of_the_last_time(project, prepare):
    store.write_jsonl("rows.jsonl", numbered(20))
    assert prepare(validation=0.1).validation_path == str(project / "out/labeled_validation.json")
    assert sorted(path.name for path in (project / "out").iterdir()) == sorted(OUTPUTS)
    assert prepare(validation=0).validation_path is None
    assert {path.name for path in (project / "out").iterdir()} == {name for name in OUTPUTS if "validation" not in name}
    assert check_labeled("out/labeled.json", "system1") == 20


# Bad input


def bad_parquet(project):
    (project / "rows.parquet").write_bytes(b"PAR1 nonsense PAR1")


BAD_SOURCES = {
    "empty slice": ("train[:0]", "rows.jsonl", lambda project: store.write_jsonl("rows.jsonl", numbered(3)), "selects no rows"),
    "beyond the end": ("train[9:]", "rows.parquet", lambda project: store.write_parquet("rows.parquet", numbered(3)), "selects no rows"),
    "missing file": ("train", "none.json", lambda project: None, "none.json does not exist"),
    "missing folder": ("train", "./none", lambda project: None, "none does not exist"),
    "empty file": ("train", "rows.jsonl", lambda project: (project / "rows.jsonl").touch(), "selects no rows"),
    "empty list": ("train", "rows.json", lambda project: store.write_json("rows.json", []), "selects no rows"),
    "empty folder": ("train", "./folder", lambda project: (project / "folder").mkdir(), "folder holds no"),
    "not JSON": ("train", "rows.json", lambda project: (project / "rows.json").write_text("a,b\n1,2"), "is not a JSON list or JSON lines"),
    "JSON that is no rows": ("train", "rows.json", lambda project: store.write_json("rows.json", [1, 2]), "row 0 is no JSON object"),
    "an object of rows": ("train", "rows.json", lambda project: store.write_json("rows.json", {"data": []}), "is not a JSON list"),
    "truncated list": (
        "train",
        "rows.json",
        lambda project: (project / "rows.json").write_text('[{"instruction": "a", "output": "b"}, {'),
        "breaks off",
    ),
    "no Parquet": ("train", "rows.parquet", bad_parquet, "rows.parquet cannot be read"),
    "no output column": (
        "train",
        "rows.jsonl",
        lambda project: store.write_jsonl("rows.jsonl", [{"instruction": "a"}]),
        "has no column 'output'; it has 'instruction'",
    ),
    "only empty outputs": (
        "train",
        "rows.jsonl",
        lambda project: store.write_jsonl("rows.jsonl", [{"instruction": "a", "output": ""}]),
        "1 with no output",
    ),
    "wrong columns": (
        "train",
        "rows.jsonl",
        lambda project: store.write_jsonl("rows.jsonl", [{"q": "a", "a": "b"}]),
        "no column 'instruction' and no column 'output'",
    ),
    "unknown split": ("test[:5]", "rows.jsonl", lambda project: store.write_jsonl("rows.jsonl", numbered(9)), "has no split 'test'"),
    "unknown split, Parquet": (
        "test",
        "rows.parquet",
        lambda project: store.write_parquet("rows.parquet", numbered(9)),
        "has no split 'test'",
    ),
    "no data file": (
        "train",
        "rows.csv",
        lambda project: (project / "rows.csv").write_text("a"),
        "a data file is .parquet, .json or .jsonl",
    ),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_a_bad_source_is_one_message_and_leaves_no_file(project, prepare, case):
    slice_str, source, make, words = BAD_SOURCES[case]
    make(project)
    before = sorted(project.rglob("*"))
    with pytest.raises(DataError) as caught:
        prepare(slice_str, source=source)
    assert str(caught.value).startswith("No data for System 1 distillation: ")
    assert words in str(caught.value)
    assert len(str(caught.value)) < 600
    assert [path for path in sorted(project.rglob("*")) if path not in before and "runs" not in path.parts] == []


def test_a_bad_source_keeps_the_files_of_the_last_time(project, prepare):
    store.write_jsonl("rows.jsonl", numbered(20))
    prepare(validation=0.1)
    before = {name: (project / "out" / name).read_bytes() for name in OUTPUTS}
    with pytest.raises(DataError):
        prepare("train[:0]")
    assert {name: (project / "out" / name).read_bytes() for name in OUTPUTS} == before


@pytest.mark.parametrize(
    "settings",
    [
        {"rows": 0},
        {"rows": True},
        {"rows": 2.0},
        {"validation": 0.6},
        {"validation": float("nan")},
        {"validation": True},
        {"seed": "x"},
        {"seed": 1.5},
        {"columns": {"outptu": "x"}},
        {"out_labeled": "/dev/null/x.json"},
        {"out_labeled": "rows.jsonl/x.json"},
        {"out_instructions": "/proc/nope/x.json"},
        {"out_labeled": "rows.jsonl"},
        {"out_labeled": "."},
        {"out_labeled": "out/instructions.json"},
        {"out_labeled": "out/instructions_validation.json"},
    ],
    ids=str,
)
def test_a_setting_that_cannot_work_is_a_config_error_and_leaves_no_file(project, prepare, settings):
    store.write_jsonl("rows.jsonl", numbered(3))
    before = (project / "rows.jsonl").read_bytes()
    with pytest.raises(ConfigError):
        prepare(**settings)
    assert list(project.iterdir()) == [project / "rows.jsonl"]
    assert (project / "rows.jsonl").read_bytes() == before


def test_a_preparation_never_writes_into_its_source_folder(project, prepare):
    store.write_jsonl("out/rows.jsonl", numbered(3))
    with pytest.raises(ConfigError, match=r"is \(in\) the source"):
        prepare(source="out")
    assert [path.name for path in (project / "out").iterdir()] == ["rows.jsonl"]


def test_a_hub_that_cannot_be_reached_is_said_and_blames_nobody(project, start_python):
    code = """
from distill.data import prepare_system1_dataset
from distill.errors import DistillError
try:
    prepare_system1_dataset("train[:5]", out_labeled="out/a.json", out_instructions="out/b.json")
except DistillError as error:
    print(type(error).__name__, error, sep=": ")
"""
    output, errors = start_python(code, HF_ENDPOINT="http://127.0.0.1:9").communicate(timeout=60)
    assert output.splitlines()[-1].startswith("ConfigError: Cannot reach the hub for alibaba-pai/DistilQwen_100k: "), output + errors
    assert not (project / "out").exists()


# Kills


@pytest.mark.parametrize("written", [0, 1, 2, 3, 4])
def test_a_preparation_killed_after_any_file_leaves_whole_files_and_a_torn_set_is_refused(project, prepare, start_python, written):
    """Files are written in the order: validation instructions, validation labels, instructions, labels, manifests."""
    store.write_jsonl("rows.jsonl", numbered(200))
    prepare(validation=0.1, seed=1)
    before = {name: (project / "out" / name).read_bytes() for name in OUTPUTS}
    store.write_jsonl("rows.jsonl", numbered(300, more="x" * 2000))
    code = """
from distill import data
real, done = store.write_rows, [0]
def slow(path, rows):
    def counted():
        for number, row in enumerate(rows):
            if done[0] == int(sys.argv[1]) and number == 5:
                print("now", flush=True)
                __import__("time").sleep(60)
            yield row
    count = real(path, counted())
    done[0] += 1
    return count
def never(*arguments, **more):
    print("now", flush=True)
    __import__("time").sleep(60)
store.write_rows, store.write_manifest = slow, never
places = {"out_labeled": "out/labeled.json", "out_instructions": "out/instructions.json"}
data.prepare_system1_dataset("train", source="rows.jsonl", validation=0.1, seed=2, **places)
"""
    process = start_python(code, written)
    assert any(line == "now\n" for line in process.stdout)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    after = {name: (project / "out" / name).read_bytes() for name in OUTPUTS}
    changed = [name for name in OUTPUTS if after[name] != before[name]]
    assert len(changed) == written
    for name in ROW_FILES:
        assert list(store.read_rows(project / "out" / name))
    if written > 1:  # the instructions alone are no part of the labelled set
        with pytest.raises(DataError, match="^No data for System 1 distillation: .*is not what .*manifest.json recorded"):
            check_labeled("out/labeled.json", "system1")
    else:
        assert check_labeled("out/labeled.json", "system1") == 180
    prepare(validation=0.1, seed=2)
    assert check_labeled("out/labeled.json", "system1") == 270
    assert sorted(path.name for path in (project / "out").iterdir()) == sorted(OUTPUTS)


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.15])
def test_a_preparation_killed_at_any_moment_leaves_a_set_that_is_whole_or_refused(project, prepare, start_python, seconds):
    store.write_jsonl("rows.jsonl", numbered(3_000))
    prepare(validation=0.1, seed=1)
    store.write_jsonl("rows.jsonl", numbered(4_000))
    code = """
from distill.data import prepare_system1_dataset
places = {"out_labeled": "out/labeled.json", "out_instructions": "out/instructions.json"}
print("now", flush=True)
prepare_system1_dataset("train", source="rows.jsonl", validation=0.1, seed=2, **places)
"""
    process = start_python(code)
    assert process.stdout.readline() == "now\n"
    time.sleep(seconds)
    process.kill()
    process.wait()
    for name in ROW_FILES:
        assert list(store.read_rows(project / "out" / name))
    try:
        assert check_labeled("out/labeled.json", "system1") in (2_700, 3_600)
    except DataError as error:
        assert "recorded" in str(error)


# Memory


def test_memory_does_not_grow_with_the_number_of_rows(project, start_python):
    """Peak resident memory of two processes that prepare 5,000 and 100,000 rows of about 300 characters."""
    line = json.dumps({"instruction": "question %d", "output": "x" * 300})
    code = """
import resource
from distill.data import prepare_system1_dataset
prepare_system1_dataset("train", source=sys.argv[1], out_labeled="out/labeled.json", out_instructions="out/instructions.json")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    peaks = []
    for count in (5_000, 100_000):
        with open(project / f"{count}.jsonl", "w") as file:
            file.writelines(line % number + "\n" for number in range(count))
        output, errors = start_python(code, f"{count}.jsonl").communicate(timeout=120)
        peaks.append(int(output.split()[-1]))
    assert (project / "out" / "labeled.json").stat().st_size > 30_000_000
    assert peaks[1] - peaks[0] < 40


def test_a_parquet_file_is_read_in_memory_that_does_not_grow_with_it(project):
    """What pyarrow holds at any time, over a file of 40 row groups of 1 MB each, is a few of them."""
    import pyarrow
    import pyarrow.parquet

    letters = random.Random(0)
    texts = [letters.randbytes(5_000).hex() for _ in range(4_000)]
    table = pyarrow.Table.from_pylist([{"instruction": str(number), "output": text} for number, text in enumerate(texts)])
    pyarrow.parquet.write_table(table, project / "rows.parquet", row_group_size=100)
    del table
    before, most = pyarrow.total_allocated_bytes(), 0
    for row in stream(Source("rows.parquet", {}, 1.0, "train")):
        most = max(most, pyarrow.total_allocated_bytes() - before)
        assert row["output"] == texts[int(row["instruction"])]
    assert row["instruction"] == "3999" and most < 8_000_000


# Labelled rows → tokens


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "does not exist"),
        ("", "is empty"),
        ("[]", "is empty"),
        ("nonsense", "is not a JSON list"),
        ('[{"instruction": "a"}]', "row 0 of .* has no output; it has instruction"),
        ('[{"instruction": "a", "output": "b"}, {"instruction": " ", "output": 5}]', "row 1 of .* has no instruction and no output"),
        ('[{"instruction": "a", "input": 5, "output": "b"}]', "row 0 of .* its input is no valid text"),
        ('[{"instruction": "a", "output": "b \\ud800"}]', "row 0 of .* its output is no valid text"),
    ],
)
@pytest.mark.parametrize("place", ["mine.json", "mine_validation.json"])
def test_labelled_rows_that_cannot_be_trained_on_are_refused(project, text, words, place):
    store.write_rows("mine.json", numbered(2))
    if text is not None:
        (project / place).write_text(text)
    elif place == "mine.json":
        (project / place).unlink()
    if place == "mine_validation.json" and (not text or text == "[]"):
        assert check_labeled("mine.json", "system1") == 2  # nothing to validate on is no mistake
        return
    with pytest.raises(
        DataError, match=f"^No data for System 1 distillation: .*{words}.* Prepare it: python distill_app.py prepare-system1"
    ):
        check_labeled("mine.json", "system1")


def test_a_labelled_file_of_ones_own_needs_no_manifest_and_a_prepared_one_must_match_it(project, prepare):
    store.write_jsonl("rows.jsonl", numbered(20))
    assert check_labeled("rows.jsonl", "system1") == 20
    prepare(validation=0.1)
    assert check_labeled("out/labeled.json", "system1") == 18
    (project / "out/labeled_validation.json").unlink()
    with pytest.raises(DataError, match="labeled_validation.json is missing or is not what"):
        check_labeled("out/labeled.json", "system1")


def test_validation_rows_of_another_preparation_are_refused_beside_a_prepared_file(project, prepare):
    """None were split off, and some lie there: training would watch rows that may be among its own."""
    store.write_jsonl("rows.jsonl", numbered(20))
    prepare(validation=0)
    assert check_labeled("out/labeled.json", "system1") == 20
    store.write_rows("out/labeled_validation.json", [{"instruction": "question 3", "output": "x"}])
    with pytest.raises(
        DataError, match=r"labeled_validation\.json is not recorded in the manifest of out/labeled\.json.* Remove it; to keep"
    ):
        check_labeled("out/labeled.json", "system1")
    (project / "out/labeled.json.manifest.json").unlink()  # rows of one's own, both
    assert check_labeled("out/labeled.json", "system1") == 20


def test_a_row_that_does_not_fit_whole_is_dropped_and_counted_and_none_is_cut(project, tokenizer):
    rows = [{"id": "a", "instruction": "Add.", "input": "2 and 2", "output": "4"}, {"instruction": "Add.", "output": "4" * 50}]
    store.write_rows("labeled.json", rows)
    counts = write_tokenized("labeled.json", tokenizer, 40, "system1", project / "tokens.json")
    (row,) = store.read_rows("tokens.json")
    assert set(row) == {"id", "instruction", "output", "input_ids", "completion_mask"}
    asked = asked_ids(tokenizer, "Add.", "2 and 2")
    assert row["input_ids"] == asked + tokenizer("4<|im_end|>")["input_ids"]
    assert row["completion_mask"] == [0] * len(asked) + [1, 1]
    assert (counts.kept, counts.too_long, counts.supervised) == (1, 1, 2)
    assert counts.longest == counts.shortest == len(row["input_ids"])
    exact = write_tokenized("labeled.json", tokenizer, counts.longest, "system1", project / "tokens.json")
    none = write_tokenized("labeled.json", tokenizer, counts.longest - 1, "system1", project / "tokens.json")
    assert (exact.kept, none.kept, none.too_long) == (1, 0, 2)
    data.require_rows(exact, "labeled.json", counts.longest, "system1")
    with pytest.raises(DataError, match=f"^No data for System 1 distillation: all 2 rows .* the shortest row has {counts.shortest}"):
        data.require_rows(none, "labeled.json", counts.longest - 1, "system1")
