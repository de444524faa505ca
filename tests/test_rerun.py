"""The lab run again: what is finished is not done again, what was cut short goes on, and a change redoes just what depends on it."""

import re
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import standin_easydistill
from conftest import REPOSITORY, run_id

from distill import answers, cli, compare, hub_rows, machine, pipeline, scores, sources, store, traces
from distill.data import prepare_system1_dataset
from distill.errors import BackendError, ConfigError, DataError, DistillError, PreflightError
from distill.models import RUN_RECORD
from distill.pipeline import distill_system1, run_easy_distill, write_system1_config
from distill.preflight import Machine
from distill.sources import Source, contents, stream
from distill.traces import prepare_system2_dataset

# Preparing


def writings(folder: Path) -> dict:
    """When each file was written, and as which."""
    files = [(str(file.relative_to(folder)), file.stat()) for file in folder.rglob("*") if file.is_file()]
    return {name: (stat.st_mtime_ns, stat.st_ino) for name, stat in files}


def numbered(count: int) -> list[dict]:
    return [{"instruction": f"question {number}", "output": f"answer {number}"} for number in range(count)]


@pytest.fixture
def prepare1(project):
    """`prepare_system1_dataset` on forty rows of the project's own."""
    store.write_jsonl("rows.jsonl", numbered(40))
    places = {"out_instructions": "data/instructions.json", "out_labeled": "data/labeled.json"}
    return lambda slice_str="train", **settings: prepare_system1_dataset(slice_str, **{"source": "rows.jsonl", **places, **settings})


def only_labels(row: dict) -> dict:
    return {**row, "output": f"{row['output']}!"}


CHANGES_OF_SYSTEM1 = {
    "slice_str was train and is train[:30]": {"slice_str": "train[:30]"},
    "rows was not set and is 20": {"rows": 20},
    "validation was 0.05 and is 0.2": {"validation": 0.2},
    "seed was 42 and is 43": {"seed": 43},
    'columns was {} and is {"output": "instruction"}': {"columns": {"output": "instruction"}},
    "what rows.jsonl holds changed": lambda: store.write_jsonl("rows.jsonl", map(only_labels, numbered(40))),
    "source was rows.jsonl and is copy.jsonl": {"source": "copy.jsonl"},
    "data/instructions_validation.json is missing": lambda: (store.ROOT / "data" / "instructions_validation.json").unlink(),
}


@pytest.mark.parametrize("reason", CHANGES_OF_SYSTEM1)
def test_system_1_is_prepared_once_and_again_after_each_change(project, prepare1, capsys, reason):
    store.write_jsonl("copy.jsonl", numbered(40))
    first, stood = prepare1(), writings(project / "data")
    assert prepare1() == first and writings(project / "data") == stood
    assert "System 1's data: done before, nothing has changed (data/labeled.json)" in capsys.readouterr().out
    change = CHANGES_OF_SYSTEM1[reason]
    made = prepare1(**change) if isinstance(change, dict) else (change(), prepare1())[1]
    assert f"System 1's data: made anew, since {reason}" in capsys.readouterr().out
    again = writings(project / "data")
    assert not set(again.values()) & set(stood.values())
    shutil.rmtree(project / "data")
    assert (prepare1(**change) if isinstance(change, dict) else prepare1()) == made


def test_a_preparation_is_made_anew_when_asked(project, prepare1):
    prepare1()
    stood = writings(project / "data")
    prepare1(fresh=True)
    assert not set(writings(project / "data").values()) & set(stood.values())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rv_max": 1}, "rv_max was 2.0 and is 1.0"),
        ({"cd_min": 1}, "cd_min was 0.0 and is 1.0"),
        ({"rows": 9}, "rows was not set and is 9"),
        ({"max_length": 200}, "max_length was 256 and is 200"),
        ({"long_share": 0.0}, "long_share was not set and is 0.0"),
    ],
)
def test_system_2_is_prepared_once_and_again_after_each_change(project, micro, capsys, change, reason):
    settings = {"source": str(micro / "omnithought.parquet"), "rows": None, "rv_max": 2, "max_length": 256}
    settings |= {"student_model": str(micro / "student_system2")}
    first, stood = prepare_system2_dataset("train[:60]", **settings), writings(project / "data")
    assert prepare_system2_dataset("train[:60]", **settings) == first and writings(project / "data") == stood
    prepare_system2_dataset("train[:60]", **settings | change)
    assert f"System 2's data: made anew, since {reason}" in capsys.readouterr().out and writings(project / "data") != stood


def test_another_tokenizer_selects_traces_anew(project, micro, tmp_path, capsys):
    student = shutil.copytree(micro / "student_system2", tmp_path / "student")
    settings = {"source": str(micro / "omnithought.parquet"), "rows": 9, "max_length": 256, "student_model": str(student)}
    prepare_system2_dataset("train[:60]", **settings)
    template = student / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    prepare_system2_dataset("train[:60]", **settings)
    assert "made anew, since the student's tokenizer changed" in capsys.readouterr().out


# Tokens of traces


KILLED_MIDWAY = """
import time
from distill import traces
really, calls = traces.trained_ids, []

def counting(*given, **more):
    calls.append(1)
    if len(calls) > 200:
        print("midway", flush=True)
        time.sleep(60)
    return really(*given, **more)

traces.trained_ids = counting
traces.prepare_system2_dataset("train[:400]", source=sys.argv[1], rows=None, max_length=256, student_model=sys.argv[2])
"""


@pytest.fixture
def killed_midway(project, micro, start_python) -> dict:
    """A preparation of traces that was killed in the midst of counting: its settings."""
    lab = start_python(KILLED_MIDWAY, micro / "omnithought.parquet", micro / "student_system2")
    assert any(line.startswith("midway") for line in lab.stdout)
    lab.kill()
    lab.wait()
    return {"source": str(micro / "omnithought.parquet"), "rows": None, "max_length": 256, "student_model": str(micro / "student_system2")}


@pytest.fixture
def counted(monkeypatch) -> list:
    """An entry for each trace that is counted in this process."""
    calls, really = [], traces.trained_ids
    monkeypatch.setattr(traces, "trained_ids", lambda *given, **more: calls.append(1) or really(*given, **more))
    return calls


def counts_kept(project: Path) -> Path:
    (journal,) = (project / "runs" / "tokens").iterdir()
    return journal


def test_a_preparation_that_was_killed_counts_no_trace_again_and_gives_the_same(project, killed_midway, counted, capsys):
    journal = counts_kept(project)
    entries = store.read_journal(journal)
    known = sum(len(entry["tokens"]) for entry in entries)
    assert 180 < known <= 200  # all but those of the question under way
    went_on = prepare_system2_dataset("train[:400]", **killed_midway)
    written, calls = Path(went_on.path).read_bytes(), len(counted)
    assert f"the traces of {len(entries):,} questions were counted before" in capsys.readouterr().out and not journal.exists()
    assert prepare_system2_dataset("train[:400]", **killed_midway, fresh=True) == went_on
    assert Path(went_on.path).read_bytes() == written and len(counted) == calls + calls + known


def test_counts_serve_another_selection_but_no_other_tokenizer_and_no_fresh_preparation(project, killed_midway, counted, micro, tmp_path):
    journal = counts_kept(project)
    known, kept = sum(len(entry["tokens"]) for entry in store.read_journal(journal)), journal.read_bytes()
    student = shutil.copytree(micro / "student_system2", tmp_path / "student")
    template = student / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    calls = []
    for place, change in enumerate([{"rv_max": 8}, {"student_model": str(student)}, {"fresh": True}]):
        before = len(counted)
        prepare_system2_dataset("train[:400]", **{**killed_midway, **change}, out_cot=f"data/{place}.json")
        calls.append(len(counted) - before)
        journal.parent.mkdir(parents=True, exist_ok=True)
        journal.write_bytes(kept)
    assert calls == [calls[1] - known, calls[1], calls[1]]


def test_a_damaged_count_is_made_again(project, killed_midway, counted, capsys):
    journal = counts_kept(project)
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([lines[0].replace(b'"tokens": [', b'"tokens": [1'), *lines[1:-1], lines[-1][:-5]]))
    prepared = prepare_system2_dataset("train[:400]", **killed_midway)
    assert "2 damaged lines are dropped; what they held is made again" in capsys.readouterr().out
    assert prepared == prepare_system2_dataset("train[:400]", **killed_midway, fresh=True)


# Rows of the hub


@pytest.fixture
def hub(project, monkeypatch):
    """Ten rows on a hub: `datasets` streams them from a local folder, whose commit is `hub.commit`; without one nobody answers."""
    store.write_parquet("hub/a.parquet", numbered(4))
    store.write_parquet("hub/b.parquet", numbered(10)[4:])
    name = str(project / "hub")

    class Hub:
        commit = "c1"

    def revision(asked):
        if Hub.commit is None:
            raise ConfigError(f"Cannot reach the hub for {asked}") from ConnectionError("no route")
        return Hub.commit

    monkeypatch.setattr(sources, "local_files", lambda asked: [])
    monkeypatch.setattr(sources, "hub_revision", revision)
    stream_really = hub_rows._stream
    monkeypatch.setattr(hub_rows, "_stream", lambda asked, revision, split, first: stream_really(asked, None, split, first))
    Hub.name = name
    return Hub


def texts(rows) -> list[str]:
    return [row["instruction"] for row in rows]


TEN = [row["instruction"] for row in numbered(10)]


def test_rows_of_the_hub_are_fetched_once_whatever_slice_of_them_is_read(project, hub):
    assert texts(stream(Source(hub.name, {}, 1.0, "train[:3]"))) == TEN[:3]
    assert texts(stream(Source(hub.name, {}, 1.0, "train[:6]"))) == TEN[:6]
    shutil.rmtree(project / "hub")
    assert texts(stream(Source(hub.name, {}, 1.0, "train[:5]"))) == TEN[:5]
    with pytest.raises(DataError, match="cannot be read.* What came before is kept, 6 rows; the same call goes on behind them"):
        list(stream(Source(hub.name, {}, 1.0, "train[:7]")))
    (journal,) = (project / "runs" / "sources").iterdir()
    assert len(journal.read_text().splitlines()) == 6


def test_where_a_split_ends_is_known_without_the_hub(project, hub):
    assert texts(stream(Source(hub.name, {}, 1.0, "train"))) == TEN
    shutil.rmtree(project / "hub")
    assert texts(stream(Source(hub.name, {}, 1.0, "train"))) == texts(stream(Source(hub.name, {}, 1.0, "train[:99]"))) == TEN


def test_a_reading_that_is_cut_short_goes_on_behind_the_last_row(project, hub):
    rows = stream(Source(hub.name, {}, 1.0, "train"))
    assert texts(next(rows) for _ in range(5)) == TEN[:5]
    rows.close()
    for file in (project / "hub").iterdir():  # what was read is destroyed: it is not fetched again
        if file.name == "a.parquet":
            content = file.read_bytes()
            footer = 8 + int.from_bytes(content[-8:-4], "little")
            file.write_bytes(content[:4] + b"\xff" * (len(content) - 4 - footer) + content[-footer:])
    assert texts(stream(Source(hub.name, {}, 1.0, "train"))) == TEN


@pytest.mark.parametrize("damage", ["flip", "truncate", "twice"])
def test_damaged_rows_on_disk_are_fetched_again_with_all_behind_them(project, hub, damage, capsys):
    list(stream(Source(hub.name, {}, 1.0, "train")))
    (journal,) = (project / "runs" / "sources").iterdir()
    whole = journal.read_bytes()
    lines = whole.splitlines(keepends=True)
    damaged = {"flip": lines[3].replace(b"answer 3", b"answer 8"), "truncate": lines[3][:-2], "twice": lines[2]}[damage]
    journal.write_bytes(b"".join([*lines[:3], damaged, *lines[4:]]))
    assert texts(stream(Source(hub.name, {}, 1.0, "train"))) == TEN
    assert "is damaged at byte" in capsys.readouterr().out and journal.read_bytes() == whole


def test_two_readings_of_the_same_rows_at_once_do_not_mix_them_up(project, hub):
    first, second = (stream(Source(hub.name, {}, 1.0, "train")) for _ in range(2))
    drawn = [next(one)["instruction"] for one in (first, second, second, first, first, second)]
    assert drawn == [TEN[0], TEN[0], TEN[1], TEN[1], TEN[2], TEN[2]] and texts(first) == texts(second) == TEN[3:]
    assert texts(stream(Source(hub.name, {}, 1.0, "train"))) == TEN


def test_another_commit_or_a_fresh_reading_fetches_anew(project, hub):
    list(stream(Source(hub.name, {}, 1.0, "train")))
    store.write_parquet("hub/a.parquet", [{"instruction": "new", "output": "new"}])
    assert texts(stream(Source(hub.name, {}, 1.0, "train"))) == TEN
    assert texts(stream(Source(hub.name, {}, 1.0, "train"), fresh=True)) == ["new", *TEN[4:]]
    hub.commit = "c2"
    assert texts(stream(Source(hub.name, {}, 1.0, "train[:1]"))) == ["new"]


def test_a_hub_that_falls_silent_midway_is_named_and_what_came_is_kept(project, hub, monkeypatch):
    really = hub_rows._stream

    def silent(*arguments):
        yield from [next(really(*arguments))]
        raise ConnectionError("429 Too Many Requests")

    monkeypatch.setattr(hub_rows, "_stream", silent)
    with pytest.raises(ConfigError, match="Cannot reach the hub for .*hub: 429 Too Many.* What came before is kept, 1 rows; the same call"):
        list(stream(Source(hub.name, {}, 1.0, "train")))
    monkeypatch.setattr(hub_rows, "_stream", really)
    assert texts(stream(Source(hub.name, {}, 1.0, "train"))) == TEN


def test_values_that_are_no_json_are_no_text_on_either_reading(project, hub):
    from datetime import date

    store.write_parquet("hub/a.parquet", [{"instruction": date(2026, 1, 1), "output": b"x"}])
    (project / "hub" / "b.parquet").unlink()
    first = list(stream(Source(hub.name, {}, 1.0, "train")))
    assert first == list(stream(Source(hub.name, {}, 1.0, "train"))) == [{"instruction": {"type": "date"}, "output": {"type": "bytes"}}]


def test_a_prepared_set_serves_while_the_hub_is_silent_and_that_is_said(project, hub, prepare1, capsys):
    first = prepare1(source=hub.name)
    hub.commit = None
    assert prepare1(source=hub.name) == first
    assert f"whether what {hub.name} holds changed since cannot be known now" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="Cannot reach the hub for"):
        prepare1(source=hub.name, seed=1)
    hub.commit = "c2"
    prepare1(source=hub.name)
    assert f"made anew, since what {hub.name} holds changed" in capsys.readouterr().out


def test_a_name_that_the_hub_does_not_know_is_no_silence(monkeypatch):
    def unknown(name):
        from huggingface_hub.errors import RepositoryNotFoundError

        raise ConfigError("No dataset") from RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(sources, "hub_revision", unknown)
    with pytest.raises(ConfigError, match="No dataset"):
        contents([Source("acme/rows", {}, 1.0, "train")])


# Training

STUDENT = REPOSITORY / "data" / "micro" / "student_system1"
PLACES = {"preset": "micro_system1", "labeled_path": "rows.json", "out_dir": "out", "config_path": "job.json"}


FORTY_ROWS = {
    **PLACES,
    "student_model": str(STUDENT),
    "backend": "builtin",
    "max_steps": 2,
    "warmup_ratio": 0.0,
    "sample_answers": 0,
    "per_device_train_batch_size": 4,
}


def distil(**more) -> str:
    """`distill_system1` on forty rows for two steps, into `out`."""
    return distill_system1({**FORTY_ROWS, **more})


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory, prepared_rows) -> Path:
    """A project in which `distil` has been done."""
    folder = tmp_path_factory.mktemp("trained") / "project"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "ROOT", folder)
        store.write_rows("rows.json", prepared_rows[:40])
        store.write_rows("rows_validation.json", prepared_rows[40:48])
        assert distil() == str(folder / "out")
    return folder


def runs(project: Path) -> list[str]:
    return sorted(folder.name for folder in (project / "runs").iterdir())


def test_a_training_is_done_once_and_again_after_a_change_of_what_decides_it(trained, capsys):
    first, folders = run_id(trained), runs(trained)
    (tokens,) = (trained / "runs").glob("*/train_tokenized.json")
    stood = tokens.stat().st_mtime_ns
    distil()
    distil(logging_steps=1)  # what is shown decides no weight
    said = capsys.readouterr().out
    assert run_id(trained) == first and runs(trained) == folders and said.count("training of out: done before, nothing has") == 2
    assert said.count("Tokens of train_tokenized.json: done before") == 2
    distil(learning_rate=1e-4)
    assert "training of out: made anew, since learning_rate was 0.002 and is 0.0001" in capsys.readouterr().out
    assert run_id(trained) != first and len(runs(trained)) == 2 and tokens.stat().st_mtime_ns == stood


def test_a_training_is_done_anew_when_asked_with_the_same_weights(trained, capsys):
    first, weights = run_id(trained), (trained / "out" / "model.safetensors").read_bytes()
    distil(fresh=True)
    assert "training of out: made anew, since that is asked for" in capsys.readouterr().out and len(runs(trained)) == 1
    assert run_id(trained) != first and (trained / "out" / "model.safetensors").read_bytes() == weights


def on_a_small_machine(monkeypatch) -> None:
    monkeypatch.setattr(pipeline, "this_machine", lambda *places: Machine("a small machine", 0.01))


def test_a_finished_training_is_not_done_again_on_a_machine_that_it_would_not_fit(trained, monkeypatch):
    first = run_id(trained)
    on_a_small_machine(monkeypatch)
    distil()
    assert run_id(trained) == first
    shutil.rmtree(trained / "out")
    with pytest.raises(PreflightError, match=r"Training does not fit: it needs .* GiB free\. No settings fit"):
        distil()


def test_a_job_file_is_refused_on_a_machine_that_it_would_not_fit_and_nothing_is_lost(trained, monkeypatch):
    job = pipeline.write_system1_config(FORTY_ROWS)
    on_a_small_machine(monkeypatch)
    assert pipeline.run_easy_distill(job, backend="builtin").reused
    shutil.rmtree(trained / "out")
    stood = writings(trained)
    with pytest.raises(PreflightError, match="Training does not fit: it needs"):
        pipeline.run_easy_distill(job, backend="builtin", fresh=True)
    assert writings(trained) == stood
    tokens = Path(store.read_json(job)["dataset"]["labeled_path"])
    facts = {name: value for name, value in store.read_manifest(tokens).items() if name not in ("counts", "files", "stage")}
    store.write_manifest(tokens, facts)
    with pytest.raises(PreflightError, match="Training does not fit: it needs"):
        pipeline.run_easy_distill(job, backend="builtin")


def test_a_plan_that_is_damaged_is_no_obstacle(trained, capsys):
    (plan,) = (trained / "runs").glob("*/plan.json")
    plan.write_text(plan.read_text()[:-9])
    first = run_id(trained)
    distil()
    assert "So what an earlier machine had changed is not known" in capsys.readouterr().out and run_id(trained) == first
    assert store.read_json(plan)["mode"] == "system1"


def test_a_damaged_checkpoint_is_not_trained_anew_on_a_machine_that_the_training_would_not_fit(trained, monkeypatch):
    weights = trained / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    on_a_small_machine(monkeypatch)
    with pytest.raises(PreflightError, match="Training does not fit: it needs"):
        distil()


def test_a_training_that_was_begun_is_refused_rather_than_begun_otherwise(trained, monkeypatch):
    shutil.rmtree(trained / "out")
    (run,) = (trained / "runs").iterdir()
    (run / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    stood = writings(run)
    on_a_small_machine(monkeypatch)
    for fresh, said in ((False, "begun with these settings"), (True, "No settings fit")):
        with pytest.raises(PreflightError, match=said):
            distil(fresh=fresh)
        assert writings(run) == stood and (run / "checkpoints" / "checkpoint-1").is_dir() and len(runs(trained)) == 1


def test_what_a_run_holds_on_the_disk_counts_as_free_for_it(trained, monkeypatch):
    (run,) = (trained / "runs").iterdir()
    (run / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    shutil.rmtree(trained / "out")
    on_a_disk(monkeypatch, 0.0)
    with pytest.raises(PreflightError, match="of disk") as refused:
        distil()
    needed = float(re.search(r"needs ([\d.]+) GiB", str(refused.value))[1])
    with open(run / "checkpoints" / "checkpoint-1" / "optimizer.pt", "wb") as file:
        file.truncate(int((needed + 0.1) * 2**30))  # sparse: it takes no room here
    distil()


def test_a_student_that_has_still_to_come_counts_on_the_disk():
    shape = pipeline.shapes.find_shape(str(STUDENT))[0]
    assert machine.download_bytes(str(STUDENT), shape) == 0
    assert machine.download_bytes("Qwen/Nowhere", shape) == 2 * shape.parameters


def on_a_disk(monkeypatch, free_gib: float) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=int(free_gib * 2**30)))


def test_what_either_backend_finished_counts_where_the_choice_is_left_to_the_lab(trained, monkeypatch):
    first = run_id(trained)
    monkeypatch.setattr(pipeline, "choose_backend", lambda job, asked, **_: (object(), "EasyDistill is here now"))
    distil(backend="auto")
    assert run_id(trained) == first


def test_changed_rows_are_tokenized_and_trained_anew(trained, capsys):
    first, rows = run_id(trained), list(store.read_rows("rows.json"))
    store.write_rows("rows.json", rows[1:])
    distil()
    assert "training of out: made anew, since the rows changed" in capsys.readouterr().out
    assert run_id(trained) != first and len(runs(trained)) == 2


def test_damage_to_tokens_and_checkpoint_is_found_and_mended(trained, capsys):
    first = run_id(trained)
    (tokens,) = (trained / "runs").glob("*/train_tokenized.json")
    for place in (trained / "out" / "model.safetensors", tokens):
        content = bytearray(place.read_bytes())
        content[len(content) // 2] ^= 1
        place.write_bytes(content)
    distil()
    said = capsys.readouterr().out
    assert run_id(trained) != first and "the checkpoint that stands there is not used" in said
    assert "Tokens of train_tokenized.json: made anew, since runs/" in said


def test_a_record_that_is_no_json_any_more_is_no_obstacle(trained, capsys):
    (trained / "out" / RUN_RECORD).write_text("{")
    distil()
    said = capsys.readouterr().out
    assert "training of out: made anew, since what stands there is damaged" in said and run_id(trained)


def test_a_second_run_on_one_out_dir_is_refused_before_it_touches_anything(trained):
    distil()  # the job names this project's places
    before = writings(trained)
    calls = [distil, lambda: distil(fresh=True), lambda: run_easy_distill("job.json", fresh=True)]
    calls.append(lambda: write_system1_config({**PLACES, "student_model": str(STUDENT), "fresh": True}))
    with store.lock("out"):
        for call in calls:
            with pytest.raises(DistillError, match="Another run is writing out now"):
                call()
    assert writings(trained) == before


def test_what_a_killed_run_left_half_made_is_no_obstacle(trained):
    first = run_id(trained)
    (folder,) = (trained / "runs").iterdir()
    for place in ("plan.json", "job.json", "train_tokenized.json.manifest.json"):
        (folder / place).unlink()
    (folder / ".train_tokenized.json.tmp-999999999-abcd").write_text("half")
    distil()
    assert run_id(trained) == first and not list(folder.glob(".*.tmp-*")) and (folder / "plan.json").is_file()


def test_an_invalid_request_leaves_no_run_folder(project):
    store.write_rows("rows.json", numbered(3))
    with pytest.raises(DataError, match="longer than max_length"):
        distil(max_length=2)
    assert not (project / "runs").exists()


def test_where_easydistill_fails_the_built_in_engine_takes_its_place_if_that_is_set(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EASYDISTILL_HOME", str(standin_easydistill.build(tmp_path / "standin", "lacks_a_package")))
    equal = {"backend": "easydistill", "group_by_length": False}
    with pytest.raises(BackendError, match="EasyDistill's training failed"):
        distil(**equal)
    distil(**equal, fall_back=True)
    record = store.read_manifest(trained / "out", name=RUN_RECORD)
    assert record["backend"] == "builtin" and record["fell_back"].startswith(
        "EasyDistill failed, and fall_back is set: EasyDistill's training"
    )
    assert "EasyDistill 1.x cannot go on where an earlier run stood: it starts over" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="fall_back = True: has no effect under backend = 'builtin'"):
        distil(fall_back=True)


# Asking: comparing and scoring


@pytest.fixture
def asked(monkeypatch) -> list:
    """Every question that reaches a model, asked for real: (model, instruction, mode)."""
    seen, really = [], answers.ask

    def ask(requests, *more):
        seen.extend(
            (request["name"], question["instruction"], question["mode"]) for request in requests for question in request["questions"]
        )
        return really(requests, *more)

    monkeypatch.setattr(answers, "ask", ask)
    return seen


def test_a_comparison_asks_only_what_is_new(project, micro, asked):
    plain, other = ({"prompt": f"Tell me the parity of {number}.", "modes": ["system1"]} for number in (4322, 4323))
    settings = {"teacher_path": "./none", "system1_path": str(micro / "student_system1"), "max_tokens_sys1": 8}
    first = compare.compare_models([plain], **settings)
    assert asked == [("system1", plain["prompt"], "system1")]
    shutil.rmtree(project / "reports")
    again = compare.compare_models([plain], **settings)
    assert len(asked) == 1 and (again.answers, again.columns) == (first.answers, first.columns)
    assert (project / "reports" / "comparison" / "comparison.html").is_file()
    compare.compare_models([plain, other], **settings)
    assert asked[1:] == [("system1", other["prompt"], "system1")]
    compare.compare_models([other], **(settings | {"max_tokens_sys1": 9}))
    assert asked[2:] == [("system1", other["prompt"], "system1")]
    compare.compare_models([other], **settings, fresh=True)
    assert asked[3:] == [("system1", other["prompt"], "system1")]


def test_scores_are_those_of_the_model_that_lies_there(project, micro, tmp_path, heldout, asked):
    """A copy has its answers, changed weights have none of them; what a kill left unanswered is asked."""
    store.write_jsonl("questions.jsonl", heldout[:1400:200])
    model = shutil.copytree(micro / "teacher", tmp_path / "model")
    request = [{"name": "model", "path": str(model), "mode": None}]
    first = scores.score(request, "questions.jsonl", tmp_path, {"system1": 12})
    assert len(asked) == 7
    model = shutil.copytree(model, tmp_path / "copy")
    request = [{"name": "copy", "path": str(model), "mode": None}]
    assert scores.score(request, "questions.jsonl", tmp_path, {"system1": 12}) == {"copy": first["model"]} and len(asked) == 7
    (journal,) = (project / "runs" / "answers").iterdir()
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    assert scores.score(request, "questions.jsonl", tmp_path, {"system1": 12}) == {"copy": first["model"]} and len(asked) == 7 + 4
    config = model / "generation_config.json"
    config.write_text(config.read_text() + " ")
    scores.score(request, "questions.jsonl", tmp_path, {"system1": 12})
    assert len(asked) == 7 + 4 + 7


# The command line


def test_fresh_reaches_what_each_command_calls(project, monkeypatch, capsys):
    """A run with `--fresh` makes data anew; every command that takes up earlier work has it."""
    store.write_jsonl("rows.jsonl", numbered(40))
    prepare = ["prepare-system1", "--source", "rows.jsonl", "--slice", "train"]
    for arguments, said in ((prepare, ""), (prepare, "done before"), ([*prepare, "--fresh"], "made anew, since that is asked for")):
        assert cli.main(arguments) == 0 and said in capsys.readouterr().out
    seen = {}
    calls = ["pipeline.distill_system1", "pipeline.distill_system2", "compare.compare_models", "demo.run_demo", "own_traces.write_traces"]
    for name in [*calls, "label.label_file", "traces.prepare_system2_dataset"]:
        monkeypatch.setattr(f"distill.{name}", lambda *given, name=name, **more: seen.update({name: given[-1:] + (more.get("fresh"),)}))
    lines = ["system1", "system2", "compare x", "demo", "traces --teacher x", "label a --teacher x --out b", "prepare-system2"]
    for line in lines:
        with suppress(AttributeError, TypeError):  # of what the calls would return
            cli.main([*line.split(), "--fresh"])
    assert len(seen) == len(lines) and all(given[-1] or given[0]["fresh"] for given in seen.values())


def test_an_interrupt_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(**settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("distill.demo.run_demo", interrupted)
    assert cli.main(["demo"]) == 130 and "Run the same command again: it goes on where it stood" in capsys.readouterr().err
