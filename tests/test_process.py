"""Commands: argument lists, whole groups, limits, and nothing that outlives the lab."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from distill import process
from distill.errors import ConfigError

PARENT_AND_CHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("child", child.pid, flush=True)
{then}
"""


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def child_of(lines: list[str]) -> int:
    return int(next(line.split()[1] for line in lines if line.startswith("child")))


def run_python(tmp_path, code: str, **settings):
    lines = []
    ended = process.run([sys.executable, "-c", code], tmp_path / "log", lambda line: lines.append(line), **settings)
    return ended, lines


def test_lines_are_handed_on_and_logged(tmp_path):
    ended, lines = run_python(tmp_path, "import sys; print('one'); print('two', file=sys.stderr, flush=True)")
    assert ended.status == 0 and sorted(lines) == ["one", "two"]
    assert sorted((tmp_path / "log").read_text().split()) == ["one", "two"]


def test_a_line_may_be_kept_out_of_the_log_and_every_line_is_cleaned_first(tmp_path):
    seen = []

    def look(line):
        seen.append(line)
        return "noise" not in line

    code = "print('key=SECRET'); print('noise')"
    process.run([sys.executable, "-c", code], tmp_path / "log", look, clean=lambda line: line.replace("SECRET", "***"))
    assert seen == ["key=***", "noise"] and (tmp_path / "log").read_text() == "key=***\n"


def test_the_exit_status_comes_through(tmp_path):
    assert run_python(tmp_path, "raise SystemExit(7)")[0].status == 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV])
def test_a_signal_comes_through(tmp_path, number):
    assert run_python(tmp_path, f"import os; os.kill(os.getpid(), {int(number)})")[0].status == -number


def test_a_command_that_is_not_there_says_so(tmp_path):
    lines = []
    ended = process.run(["/nowhere/easydistill"], tmp_path / "log", lambda line: lines.append(line))
    assert ended.status == 127 and "No such file" in lines[0]


def test_an_argument_is_never_read_by_a_shell(tmp_path):
    hostile = "; touch pwned $(touch pwned) `touch pwned` \n ' \""
    lines = []
    process.run([sys.executable, "-c", "import sys; print(repr(sys.argv[1]))", hostile], tmp_path / "log", lines.append, cwd=tmp_path)
    assert lines == [repr(hostile)] and not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(("limit", "name"), [("limit_seconds", "limit"), ("silence_seconds", "silence")])
def test_a_limit_ends_the_whole_group(tmp_path, limit, name):
    ended, lines = run_python(tmp_path, PARENT_AND_CHILD.format(then="time.sleep(60)"), **{limit: 1.5})
    assert ended.overdue == name and ended.seconds < 10
    assert not is_running(child_of(lines))


def test_silence_is_counted_from_the_last_line(tmp_path):
    code = "import time\nfor _ in range(8): print('line', flush=True); time.sleep(0.3)"
    ended, lines = run_python(tmp_path, code, silence_seconds=1.5)
    assert ended.overdue == "" and ended.status == 0 and len(lines) == 8


def test_a_child_that_its_parent_left_behind_is_ended(tmp_path):
    code = PARENT_AND_CHILD.format(then="import os; os.close(1); os.close(2); os.kill(os.getpid(), 9)")
    code = code.replace('time.sleep(60)"])', 'time.sleep(60)"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)')
    ended, lines = run_python(tmp_path, code)
    assert ended.status == -signal.SIGKILL
    assert not is_running(child_of(lines))


def test_a_child_left_behind_that_holds_the_output_does_not_keep_the_lab_waiting(tmp_path):
    ended, lines = run_python(tmp_path, PARENT_AND_CHILD.format(then="raise SystemExit(3)"))
    assert ended.status == 3 and ended.seconds < 10 and not is_running(child_of(lines))


def test_one_that_ignores_a_polite_end_is_ended_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "PATIENCE_SECONDS", 0.5)
    code = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('child', os.getpid(), flush=True); time.sleep(60)"
    ended, lines = run_python(tmp_path, code, limit_seconds=1)
    assert ended.overdue == "limit" and not is_running(child_of(lines))


def test_an_interrupt_ends_the_group(tmp_path):
    lines = []

    def interrupt(line):
        lines.append(line)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        process.run([sys.executable, "-c", PARENT_AND_CHILD.format(then="time.sleep(60)")], tmp_path / "log", interrupt)
    assert not is_running(child_of(lines))


def test_a_killed_lab_leaves_nothing_at_work(tmp_path, start_python):
    code = f"""
from distill import process
from distill.errors import ConfigError
process.run([sys.executable, "-c", {PARENT_AND_CHILD.format(then="time.sleep(60)")!r}], Path(sys.argv[1]),
    lambda line: print(line, flush=True))
"""
    lab = start_python(code, tmp_path / "log")
    child = child_of([lab.stdout.readline()])
    assert is_running(child)
    os.kill(lab.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def test_the_end_of_a_log_is_printable(tmp_path):
    log = tmp_path / "log"
    log.write_text("first\n\n@event x\nsecond \x1b[31m\n" + "x" * 1000 + "\n")
    shown = process.tail(log, lines=2, skip="@event")
    assert shown[0] == "  | second \ufffd[31m" and len(shown[1]) < 360
    assert process.tail(tmp_path / "none") == []


def test_a_process_in_a_session_of_its_own_is_ended_too(tmp_path):
    code = PARENT_AND_CHILD.format(then="time.sleep(60)").replace('time.sleep(60)"])', 'time.sleep(60)"], start_new_session=True)')
    ended, lines = run_python(tmp_path, code, limit_seconds=1)
    assert ended.overdue == "limit" and not is_running(child_of(lines))


def test_a_killed_lab_leaves_no_session_of_another_kind(tmp_path, start_python):
    code = PARENT_AND_CHILD.format(then="time.sleep(60)").replace('time.sleep(60)"])', 'time.sleep(60)"], start_new_session=True)')
    shown = "lambda line: print(line, flush=True)"
    lab = start_python(
        f"from distill import process\nprocess.run([sys.executable, '-c', {code!r}], Path(sys.argv[1]), {shown})", tmp_path / "log"
    )
    child = child_of([lab.stdout.readline()])
    os.kill(lab.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def test_one_command_is_ended_and_another_goes_on(tmp_path):
    with open(tmp_path / "other.log", "w") as output:
        other = process.start([sys.executable, "-c", "import time; time.sleep(60)"], output=output)
    run_python(tmp_path, "print('short')")
    assert other.poll() is None
    process.end(other)
    assert other.poll() is not None and not process._running


def test_nothing_is_started_where_the_log_cannot_be_opened(tmp_path):
    with pytest.raises(ConfigError, match="Cannot write .*nowhere"):
        process.run([sys.executable, "-c", "open('started', 'w')"], tmp_path / "nowhere" / "log", cwd=tmp_path)
    assert not (tmp_path / "started").exists()


def test_a_disk_that_is_full_for_the_log_is_named_and_ends_the_command():
    code = "import time\nwhile True: print('x' * 10_000, flush=True); time.sleep(0.01)"
    with pytest.raises(ConfigError, match="Cannot write /dev/full: No space left on device"):
        process.run([sys.executable, "-c", code], Path("/dev/full"))
    assert not process._running
