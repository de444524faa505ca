"""Rows of the hub by the real `datasets` and `huggingface_hub`, from a hub on this machine: slow, busy, killed midway, down."""

import signal

import pytest
from hub_server import NAME, Hub

from distill import store

PREPARE = """
import datasets
datasets.config.STREAMING_READ_MAX_RETRIES, datasets.config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 2, 0
from distill.data import prepare_system1_dataset
from distill.errors import DistillError
settings = {"source": "acme/rows", "validation": 0, "out_instructions": "instructions.json", "out_labeled": "labeled.json"}
try:
    print(prepare_system1_dataset(*sys.argv[1:], **settings).kept, "rows")
except DistillError as error:
    print(type(error).__name__, error, sep=": ")
"""
SLOWLY = """
from distill.sources import Source, stream
for number, row in enumerate(stream(Source("acme/rows", {}, 1.0, "train"))):
    if number == 60:
        print("now", flush=True)
        __import__("time").sleep(60)
"""


@pytest.fixture
def hub(tmp_path):
    """A hub with three files of forty rows each."""
    (tmp_path / "hub").mkdir()
    for number in range(3):
        rows = [{"instruction": f"question {row}", "output": f"answer {row}"} for row in range(40 * number, 40 * number + 40)]
        store.write_parquet(tmp_path / "hub" / f"train-{number}.parquet", rows)
    hub = Hub(tmp_path / "hub")
    yield hub
    hub.close()


@pytest.fixture
def prepare(hub, start_python):
    """`prepare_system1_dataset` in a process that knows this hub; returns what it said."""

    def run(slice_str: str = "train") -> str:
        output, errors = start_python(PREPARE, slice_str, HF_ENDPOINT=hub.url).communicate(timeout=120)
        assert output, errors
        return output

    return run


def questions() -> list[str]:
    return [row["instruction"] for row in store.read_rows("labeled.json")]


ALL = [f"question {number}" for number in range(120)]


def test_another_slice_is_read_from_disk_and_what_it_lacks_from_the_hub(hub, prepare, project):
    assert "50 rows" in prepare("train[:50]") and questions() == ALL[:50]
    (row,) = [row for row in store.read_rows("labeled.json") if row["instruction"] == "question 7"]
    assert (row["source"], row["revision"]) == (NAME, hub.commit)
    fetched = dict(hub.fetched)
    assert "30 rows" in prepare("train[:30]") and questions() == ALL[:30] and dict(hub.fetched) == fetched
    assert "50 rows had been read before; what is read is kept in runs/sources/" in prepare("train") and questions() == ALL
    assert hub.fetched["train-0.parquet"] <= fetched["train-0.parquet"] + 1  # its footer, to know where row 50 lies


def test_a_hub_that_is_busy_midway_is_asked_again_then_named_and_what_came_is_kept(hub, prepare, project):
    first = (hub.folder / "train-0.parquet").stat().st_size
    hub.busy_after = hub.sent_bytes + 3 * first
    said = prepare()
    assert "ConfigError: No data" not in said and "Cannot reach the hub for acme/rows" in said and hub.refused > 1
    assert "What came before is kept, 40 rows; the same call goes on behind them." in said and not (project / "labeled.json").exists()
    hub.busy_after = None
    before = hub.fetched["train-0.parquet"]
    assert "120 rows" in prepare() and questions() == ALL and hub.fetched["train-0.parquet"] <= before + 1


def test_a_reading_that_is_killed_goes_on_behind_its_last_row(hub, prepare, start_python, project):
    process = start_python(SLOWLY, HF_ENDPOINT=hub.url)
    assert any(line == "now\n" for line in process.stdout)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (journal,) = (project / "runs" / "sources").iterdir()
    assert len(journal.read_bytes().splitlines()) == 61
    assert "61 rows had been read before" in prepare() and questions() == ALL


def test_without_the_hub_what_was_prepared_serves_and_nothing_else(hub, prepare, project):
    assert "120 rows" in prepare()
    hub.silent = True
    said = prepare()
    assert "whether what acme/rows holds changed since cannot be known now" in said and "120 rows" in said
    assert "ConfigError: Cannot reach the hub for acme/rows" in prepare("train[:7]") and questions() == ALL


def test_another_commit_is_another_data_set(hub, prepare, project):
    prepare()
    hub.commit = "b" * 40
    said = prepare()
    assert "System 1's data: made anew, since what acme/rows holds changed" in said
    assert {row["revision"] for row in store.read_rows("labeled.json")} == {hub.commit}
