"""Files are whole or absent: in an exception, in a SIGKILL, on a place that cannot be written to."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill import store
from distill.errors import ConfigError, DataError, DistillError


def names(folder):
    return sorted(path.name for path in folder.rglob("*"))


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# Paths


def test_a_relative_path_counts_from_the_root_whatever_the_working_directory(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert store.resolve("data/../x.json") == project / "x.json"
    assert store.shown("x.json") == "x.json"
    assert store.shown(tmp_path / "y.json") == str(tmp_path / "y.json")


@pytest.mark.parametrize("path", ["a\0b", "~nobody-of-this-name/x", "n" * 256, "é" * 128, "x/\ud800"])
def test_a_path_that_is_none_is_a_config_error(path):
    with pytest.raises(ConfigError, match="is no path"):
        store.resolve(path)


# Writing


def test_a_file_appears_only_when_its_block_ends(tmp_path):
    with store.atomic_file(tmp_path / "new" / "x.txt") as file:
        file.write("half")
        file.flush()
        assert not (tmp_path / "new" / "x.txt").exists()
    assert (tmp_path / "new" / "x.txt").read_text() == "half"
    assert names(tmp_path / "new") == ["x.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("write", [store.atomic_file, store.atomic_folder])
def test_an_exception_leaves_nothing_not_even_the_parent_folders_it_made(tmp_path, write, error):
    with pytest.raises(error):
        with write(tmp_path / "a" / "b" / "c") as place:
            (place / "x").write_text("x") if write is store.atomic_folder else place.write("x")
            raise error
    assert names(tmp_path) == []


def test_a_reader_that_is_half_through_a_file_reads_the_old_one_to_its_end(tmp_path):
    store.write_rows(tmp_path / "x", ({"old": number} for number in range(1000)))
    whole = (tmp_path / "x").read_bytes()
    with open(tmp_path / "x", "rb", buffering=0) as reader:
        begun = reader.read(10)
        store.write_rows(tmp_path / "x", [{"new": 1}])
        assert begun + reader.read() == whole
    assert list(store.read_rows(tmp_path / "x")) == [{"new": 1}]


def test_parent_folders_that_stood_before_or_hold_others_files_stay(tmp_path):
    (tmp_path / "stood").mkdir()
    with pytest.raises(RuntimeError):
        with store.atomic_file(tmp_path / "stood" / "made" / "x") as _:
            (tmp_path / "stood" / "made" / "other").write_text("theirs")
            raise RuntimeError
    assert names(tmp_path) == ["made", "other", "stood"]


def test_an_exception_keeps_the_old_file_and_the_old_folder(tmp_path):
    store.write_json(tmp_path / "x.json", "old")
    with store.atomic_folder(tmp_path / "folder") as folder:
        (folder / "a").write_text("old")
    for write, path in ((store.atomic_file, tmp_path / "x.json"), (store.atomic_folder, tmp_path / "folder")):
        with pytest.raises(RuntimeError), write(path):
            raise RuntimeError
    assert store.read_json(tmp_path / "x.json") == "old"
    assert (tmp_path / "folder" / "a").read_text() == "old"
    assert names(tmp_path) == ["a", "folder", "x.json"]


def test_a_new_folder_keeps_the_last_one_as_previous_and_no_earlier_one(tmp_path):
    for version in "123":
        with store.atomic_folder(tmp_path / "out") as folder:
            (folder / version).write_text(version)
    assert names(tmp_path / "out") == ["3"]
    assert names(tmp_path / "out.previous") == ["2"]
    assert len(list(tmp_path.iterdir())) == 2


def test_what_a_dead_process_left_is_swept_and_a_living_ones_is_not(tmp_path):
    dead, living = f".x[1].tmp-{dead_pid()}-ab", f".x[1].tmp-{os.getppid()}-ab"
    others = f".y.tmp-{dead_pid()}-ab"
    for name in (dead, living, others):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("half")
    store.write_json(tmp_path / "x[1]", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([living, others, "x[1]"])


def test_a_previous_folder_that_a_kill_left_half_removed_is_swept(tmp_path):
    """A kill between the renames and the removal leaves the outdated folder under a name that the next writer knows."""
    code = """
import shutil
shutil.rmtree = lambda *a, **k: os.kill(os.getpid(), 9)
with store.atomic_folder(sys.argv[1]) as folder: (folder / 'x').touch()"""
    for _ in range(2):
        with store.atomic_folder(tmp_path / "out") as folder:
            (folder / "x").touch()
    command = [sys.executable, "-c", f"import os, sys\nfrom distill import store\n{code}", str(tmp_path / "out")]
    assert subprocess.run(command, cwd=store.ROOT).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 3
    with store.atomic_folder(tmp_path / "out") as folder:
        (folder / "x").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.previous"]


UNWRITABLE = [
    "{tmp}/file/x",
    "{tmp}/file/a/b/x",
    "/proc/nope/a/x",
    "/dev/null/x",
    "/proc/nope",
    "{tmp}/new/" + "n" * 250,
    "{tmp}/new/" + "n" * 300 + "/x",
]


@pytest.mark.parametrize("place", UNWRITABLE, ids=range(len(UNWRITABLE)))
@pytest.mark.parametrize(
    "write", [store.check_writable, lambda path: store.write_json(path, 1), lambda path: store.atomic_folder(path).__enter__()]
)
def test_an_unwritable_place_is_a_config_error_and_leaves_nothing(tmp_path, place, write):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ConfigError, match="Cannot write .*/|is no path: a name in it is longer than 255"):
        write(place.format(tmp=tmp_path))
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_checking_a_place_leaves_nothing_behind(tmp_path):
    store.check_writable(tmp_path / "a" / "b" / "x.json")
    assert names(tmp_path) == []


def test_a_full_disk_is_a_config_error_and_leaves_nothing(tmp_path):
    with pytest.raises(ConfigError, match="No space left"):
        with store.atomic_file(tmp_path / "a" / "x") as _, open("/dev/full", "w") as full:
            full.write("x")
    assert names(tmp_path) == []


def test_an_error_of_the_blocks_own_work_is_not_taken_for_an_unwritable_place(tmp_path):
    with pytest.raises(ConnectionRefusedError):
        with store.atomic_file(tmp_path / "x"):
            raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")


@pytest.mark.parametrize("seen_rows", [0, 1, 700, 20_000])
def test_a_writer_killed_at_any_moment_leaves_the_old_file_whole(tmp_path, start_python, seen_rows):
    path = tmp_path / "rows.json"
    store.write_rows(path, ({"old": number} for number in range(50)))
    before = path.read_bytes()
    code = """
def rows():
    number = 0
    while True:
        if number == int(sys.argv[2]): print("now", flush=True)
        yield {"new": number, "text": "x" * 200}
        number += 1
store.write_rows(sys.argv[1], rows())
"""
    process = start_python(code, path, seen_rows)
    assert process.stdout.readline() == "now\n"
    assert any(".tmp-" in name for name in names(tmp_path))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert path.read_bytes() == before
    assert store.write_rows(path, [{"new": 1}]) == 1
    assert not [name for name in names(tmp_path) if ".tmp-" in name]


# Rows

ROWS = [{"a": 1, "text": 'é "[{,}]" \u2028 \n'}, {"b": [1, {"c": None}]}, {}]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=4, ensure_ascii=False),
        "\n \t" + json.dumps(ROWS, separators=(",", ":")) + "\n\n",
        "\n".join(map(json.dumps, ROWS)),
        "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\r\n",
    ],
    ids=["list", "pretty list", "list in blanks", "lines", "lines with blank ones"],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "BOM"])
def test_rows_are_read_as_json_reads_them(tmp_path, text, mark):
    (tmp_path / "rows").write_bytes((mark + text).encode())
    assert list(store.read_rows(tmp_path / "rows")) == ROWS


@pytest.mark.parametrize("write", [store.write_rows, store.write_jsonl])
def test_rows_written_are_read_back_exactly(tmp_path, write):
    write(tmp_path / "rows", iter(ROWS))
    assert list(store.read_rows(tmp_path / "rows")) == ROWS
    write(tmp_path / "rows", [])
    assert list(store.read_rows(tmp_path / "rows")) == []


@pytest.mark.parametrize("chars", range(1, 12))
def test_rows_that_straddle_the_read_buffer_are_whole(tmp_path, monkeypatch, chars):
    monkeypatch.setattr(store, "READ_CHARS", chars)
    (tmp_path / "rows").write_text(json.dumps(ROWS, indent=1))
    assert list(store.read_rows(tmp_path / "rows")) == ROWS


BAD_ROWS = {
    '[{"a": 1}, {"b": 2}': "ends before its list does",
    '[{"a": 1}, {"b": "cut': "breaks off near",
    "[": "ends before its list does",
    '[{"a": 1}] {"b": 2}': "text follows the list's end",
    '[{"a": 1}, nonsense]': "breaks off near 'nonsense]'",
    '{"a": 1}\n{"b": ': "line 2",
    '\n\n{"a": 1}\n{"b": ': "line 4",
    "instruction,output\na,b": "line 1",
    '{\n  "pretty": "object"\n}': "line 1",
    '[{"a": 1}, 7]': "row 1 is no JSON object but 7",
    '{"a": 1}\n"text"': 'row 1 is no JSON object but "text"',
    '[{"a": ' + "[" * 100_000: "recursion",
}


@pytest.mark.parametrize("text", BAD_ROWS, ids=lambda text: text[:24])
def test_a_file_that_is_no_rows_is_a_data_error_that_names_the_place(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(DataError) as caught:
        list(store.read_rows(tmp_path / "bad.json"))
    assert "bad.json" in str(caught.value)
    assert BAD_ROWS[text] in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_truncated_list_yields_its_whole_rows_before_it_raises(tmp_path):
    (tmp_path / "cut").write_text('[{"a": 1}, {"a": 2}, {"a"')
    rows, read = [], store.read_rows(tmp_path / "cut")
    with pytest.raises(DataError):
        rows.extend(read)
    assert rows == [{"a": 1}, {"a": 2}]


def test_an_empty_file_holds_no_rows(tmp_path):
    (tmp_path / "empty").write_text(" \n")
    assert list(store.read_rows(tmp_path / "empty")) == []


@pytest.mark.parametrize("content", [b"\xff\xfe[\x00", b"PAR1\x00\x15\xff\xfe", b'[{"a": "\xe9"}]'], ids=["utf-16", "parquet", "latin-1"])
def test_bytes_that_are_no_utf8_are_a_data_error(tmp_path, content):
    (tmp_path / "bytes").write_bytes(content)
    for read in (lambda path: list(store.read_rows(path)), store.read_json):
        with pytest.raises(DataError, match="bytes"):
            read(tmp_path / "bytes")


def test_a_missing_file_or_a_folder_is_a_data_error(tmp_path):
    for read in (lambda path: list(store.read_rows(path)), store.read_json):
        with pytest.raises(DataError, match="does not exist"):
            read(tmp_path / "none.json")
        with pytest.raises(DataError, match=tmp_path.name):
            read(tmp_path)


def test_a_row_of_ten_megabytes_costs_linear_time(tmp_path, monkeypatch):
    """The row is 1,000 times the read buffer; reading it anew for every buffer would take minutes."""
    monkeypatch.setattr(store, "READ_CHARS", 10_000)
    row = {"text": "x\u00e9" * 5_000_000}
    store.write_rows(tmp_path / "big", [{"small": 1}, row, {"small": 2}])
    began = time.process_time()
    read = list(store.read_rows(tmp_path / "big"))
    assert time.process_time() - began < 3
    assert read == [{"small": 1}, row, {"small": 2}]


def test_reading_ten_times_the_rows_costs_about_ten_times_the_time(tmp_path):
    def seconds(count):
        store.write_rows(tmp_path / "rows", ({"instruction": f"question {number}", "output": "x" * 40} for number in range(count)))
        best = 9.0
        for _ in range(3):
            began = time.process_time()
            assert sum(1 for _ in store.read_rows(tmp_path / "rows")) == count
            best = min(best, time.process_time() - began)
        return best

    assert seconds(100_000) < 30 * seconds(10_000)


# Manifests


@pytest.fixture
def sealed(tmp_path):
    folder = tmp_path / "sealed"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("aaa")
    (folder / "deep" / "b.txt").write_text("bbb")
    store.write_manifest(folder, {"seed": 1})
    return folder


def test_a_manifest_gives_its_facts_while_its_files_are_as_they_were(sealed):
    manifest = store.read_manifest(sealed)
    assert manifest["seed"] == 1
    assert sorted(manifest["files"]) == ["a.txt", "deep/b.txt"]
    store.write_manifest(sealed, {"seed": 2})
    assert store.read_manifest(sealed)["seed"] == 2


def damage_missing(folder):
    (folder / "deep" / "b.txt").unlink()


def damage_same_length(folder):
    (folder / "deep" / "b.txt").write_text("bbc")


def damage_truncated(folder):
    (folder / "deep" / "b.txt").write_text("bb")


@pytest.mark.parametrize("damage", [damage_missing, damage_same_length, damage_truncated])
def test_a_missing_or_changed_file_is_a_data_error_that_names_it(sealed, damage):
    damage(sealed)
    with pytest.raises(DataError, match="deep/b.txt is missing or is not what"):
        store.read_manifest(sealed)


def test_no_manifest_means_none_and_a_broken_one_is_a_data_error(sealed):
    assert store.read_manifest(sealed / "deep") is None
    for broken in ("[]", "{}", '{"files": {"a.txt": 1}}', '{"files": {"a.txt": {}}}', "{"):
        (sealed / "manifest.json").write_text(broken)
        with pytest.raises(DataError, match="manifest.json"):
            store.read_manifest(sealed)


def test_a_files_manifest_lies_beside_it(tmp_path):
    store.write_json(tmp_path / "x.json", 1)
    store.write_manifest(tmp_path / "x.json", {"read": 1})
    assert store.read_manifest(tmp_path / "x.json")["files"].keys() == {"x.json"}
    store.write_json(tmp_path / "x.json", 2)
    with pytest.raises(DataError, match="x.json is missing or is not"):
        store.read_manifest(tmp_path / "x.json")


def test_a_json_hash_ignores_the_order_of_keys_and_nothing_else():
    assert store.hash_json({"a": 1, "b": [1, 2]}) == store.hash_json({"b": [1, 2], "a": 1})
    assert len({store.hash_json(value) for value in ([1, 2], [2, 1], ["1", 2], {"a": 1}, {"a": None}, "\ud800", "")}) == 7


# Locks


def test_a_second_process_is_refused_at_once_and_a_killed_holder_leaves_nothing_locked(tmp_path, start_python):
    target = tmp_path / "out"
    holder = start_python("with store.lock(sys.argv[1]): print('held', flush=True); import time; time.sleep(60)", target)
    assert holder.stdout.readline() == "held\n"
    began = time.monotonic()
    with pytest.raises(DistillError, match="Another run is writing .*out now"), store.lock(target):
        pytest.fail("two processes hold one lock")
    assert time.monotonic() - began < 3
    with store.lock(tmp_path / "elsewhere"):
        holder.kill()
        holder.wait()
    with store.lock(target):
        assert not target.exists()


def test_a_lock_is_free_again_after_its_block_and_after_an_exception(project):
    with pytest.raises(RuntimeError), store.lock("out"):
        raise RuntimeError
    with store.lock("out"), pytest.raises(DistillError, match="Another run"), store.lock(project / "x" / ".." / "out"):
        pytest.fail("one place has two locks")
    with store.lock("out"):
        assert not list(project.iterdir())


def test_a_publication_cut_between_its_renames_is_put_right(tmp_path):
    """Killed after the old folder was set aside and before the new one took its name: the old one stands at its place again."""
    place = tmp_path / "student"
    (tmp_path / "student.previous").mkdir()
    (tmp_path / "student.previous" / "weights").write_text("old")
    (tmp_path / f".student.tmp-{dead_pid()}-ab").mkdir()
    store.recover(place)
    assert (place / "weights").read_text() == "old" and names(tmp_path) == ["student", "weights"]


def test_a_folder_that_its_user_removed_stays_removed(tmp_path):
    for version in "12":
        with store.atomic_folder(tmp_path / "out") as folder:
            (folder / version).touch()
    shutil.rmtree(tmp_path / "out")
    store.recover(tmp_path / "out")
    store.check_writable(tmp_path / "out")
    assert names(tmp_path) == ["1", "out.previous"]


def test_a_place_is_locked_under_every_name_and_whatever_folder_for_temporary_files_a_process_has(project, tmp_path, start_python):
    (tmp_path / "link").symlink_to(project)
    (tmp_path / "other").mkdir()
    with store.lock("out"):
        with pytest.raises(DistillError, match="Another run"), store.lock(tmp_path / "link" / "out"):
            pytest.fail("one place has two locks")
        other = start_python("from distill import store\nwith store.lock('out'): pass", TMPDIR=str(tmp_path / "other"))
        assert "Another run is writing out now" in other.communicate()[1] and other.returncode


def test_a_failed_second_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    place = tmp_path / "student"
    with store.atomic_folder(place) as folder:
        (folder / "weights").write_text("old")
    rename = Path.rename

    def fail_at_the_end(self, target):
        if Path(target) == place and ".tmp-" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_at_the_end)
    with pytest.raises(KeyboardInterrupt), store.atomic_folder(place) as folder:
        (folder / "weights").write_text("new")
    monkeypatch.undo()
    assert (place / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
