"""What the lab makes is copied to a folder in the background, by a thread of the lab's own process, which no training waits for.

The thread looks every POLL_SECONDS for what differs from its copy, by content, and copies one thing at a time. A drive that vanishes, slows
or fills is told of once each time that its state changes; the work goes on here, and is copied when the drive is back.
"""

import errno
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import hub_cache, items, rotation, store
from .console import say
from .copies import Copy, CopyFolder, TakenOver, Vanished
from .errors import DataError, DistillError

POLL_SECONDS = 10
HURRIED_SECONDS = 1
LONGEST_PAUSE_SECONDS = 300
RESTS = 5  # a journal that grows is copied again after so many times as long as its copying took
LONGEST_REST_SECONDS = 120
SLOW_SECONDS = 60
SLOW_BYTES_PER_SECOND = 1 << 20
EXIT_SECONDS = 60
_FULL = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True)
class Status:
    """How copying stands.

    state    "well", "slow", "full", "gone", "failing" or "ended"
    copies   items that have a copy, and their bytes in `size_bytes`
    waiting  names of what is not copied yet
    copying  what is being copied, with MiB done and seconds, or None
    """

    folder: str
    state: str
    copies: int
    size_bytes: int
    waiting: list[str]
    copying: str | None


@dataclass
class _Work:
    """The copy that is being made."""

    name: str
    started: float
    done_bytes: int = 0

    def __str__(self) -> str:
        return f"{self.name}, {self.done_bytes / 2**20:.0f} MiB in {time.monotonic() - self.started:.0f} s"


class Mirror:
    """Copies what the lab makes to a folder, in the background, until `close`.

    folder    the folder of copies, opened
    roots     {"project": the lab's folder, "hub": the hub's cache}
    record    item → {"number", "files_sha256"}: what was last copied or restored
    remember  called with the record where a round has changed it
    """

    def __init__(self, folder: CopyFolder, roots: dict[str, Path], record: dict[str, dict], remember: Callable[[dict], None]) -> None:
        self.folder, self.roots, self.record, self.remember = folder, roots, record, remember
        self._models_before = hub_cache.models_in(roots["hub"])
        self._remembered: dict[str, dict] = {}
        self._seen: dict[str, tuple] = {}  # signatures of what is known to be copied, or to be none that can be
        self._rests: dict[str, float] = {}  # journal → when it is copied again
        self._state, self._failures, self._work = "well", 0, None
        self._changed, self._wake = threading.Condition(), threading.Event()
        self._begun = self._ended = self._hurried = 0  # rounds; calls that wait
        self._left: list[str] = []
        self.stopped = False
        self._threads = [threading.Thread(target=target, daemon=True, name="persist") for target in (self._run, self._watch)]

    def start(self) -> "Mirror":
        for thread in self._threads:
            thread.start()
        return self

    def flush(self, timeout_seconds: float = EXIT_SECONDS) -> list[str]:
        """Wait until everything that is here now is copied, at most `timeout_seconds`. Returns the names of what is not."""
        with self._changed:
            wanted = self._begun + 1  # the one that is going on may have passed by what is new
            self._hurried += 1
            self._wake.set()
            done = self._changed.wait_for(lambda: self.stopped or (self._ended >= wanted and not self._left), timeout_seconds)
            self._hurried -= 1
        return [] if done and not self.stopped else self.waiting()

    def waiting(self) -> list[str]:
        """The names of what is not copied as it is now."""
        return [item.name for item in self._items() if self._seen.get(item.name) != _signature(item)]

    def status(self) -> Status:
        newest = [made[-1] for made in list(self.folder.copies.values()) if made]
        size_bytes, work = sum(copy.size_bytes for copy in newest), self._work
        return Status(str(self.folder.folder), self._state, len(newest), size_bytes, self.waiting(), str(work) if work else None)

    def close(self, timeout_seconds: float = EXIT_SECONDS) -> None:
        """Copy what is left, at most `timeout_seconds` long, say what is not copied, and end."""
        if not self.stopped and (left := self.flush(timeout_seconds)):
            say(f"{self.folder.folder}: {len(left)} not copied yet: {some(left)}")
        self.stopped = True
        self._wake.set()

    # The thread

    def _run(self) -> None:
        try:
            while not self.stopped:
                self._wake.clear()
                whole = self._cycle()
                if whole and not self.stopped:
                    self._wake.wait(self._pause_seconds())
        finally:
            with self._changed:
                self.stopped, self._state = True, "ended"
                self._changed.notify_all()

    def _cycle(self) -> bool:
        """One round, and what is to be said of it. Returns whether to pause after it."""
        self._begun += 1
        this = self._begun
        try:
            self.folder.check()
            if self._failures:
                self.folder.sweep()
            whole = self._round()
        except TakenOver as error:
            self.stopped = True
            self._turn("ended", str(error))
            return True
        except Exception as error:  # noqa: BLE001 (copying must not end unheard)
            self._trouble(error)
            return True
        if whole:
            self._failures = 0
            self._turn("well", f"{self.folder.folder} takes copies again; everything is copied")
            with self._changed:
                self._ended = this
                self._changed.notify_all()
        return whole

    def _pause_seconds(self) -> float:
        if self._hurried:
            return HURRIED_SECONDS
        return min(POLL_SECONDS * 2**self._failures, LONGEST_PAUSE_SECONDS)

    def _round(self) -> bool:
        """Copy what differs, the dearest first. Returns False where copying took so long that something dearer may be new."""
        self._left, full = [], None
        here = self._items()
        for item in here:
            started = time.monotonic()
            try:
                if self._visit(item) and time.monotonic() - started > POLL_SECONDS:
                    return False
            except items.SourceChanged:
                self._left.append(item.name)
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                full = error  # what is smaller may still find room
        self.folder.drop_older()
        rotation.thin(self.folder)
        if not full and not self._left:
            self._forget_removed({item.name for item in here})
        if self.record != self._remembered:
            self.remember(self.record)
            self._remembered = dict(self.record)
        if full:
            raise full
        return True

    def _items(self) -> list[items.Item]:
        held = {name.split("/")[1] for name in list(self.folder.copies) if name.startswith("hub/")}
        new = hub_cache.models_in(self.roots["hub"]) - self._models_before
        return items.found(self.roots, held | new | hub_cache.models_of_jobs(self.roots["project"]))

    def _visit(self, item: items.Item) -> bool:
        """Copy an item unless its copy holds the same. Returns whether it was copied."""
        stamp = items.signature(item)
        if stamp == self._seen.get(item.name) or (not self._hurried and time.monotonic() < self._rests.get(item.name, 0)):
            return False
        newest = before = self.folder.newest(item.name)
        try:
            if before is None or not _is_same(item, before, stamp):
                newest = self._copy_or_make_room(item)
            self.record[item.name] = {"number": newest.number, "files_sha256": store.hash_json(newest.files)}
        except DataError as error:
            if items.signature(item) != stamp:
                raise items.SourceChanged(str(error)) from error
            say(str(error))
        self._seen[item.name] = stamp
        return newest is not before

    def _copy_or_make_room(self, item: items.Item) -> Copy:
        if item.kind == "training":
            rotation.drop_former(self.folder, item, self.roots, self.record)
        try:
            return self._copy(item)
        except OSError as error:
            # the hub gives a model again; nobody gives a checkpoint
            if error.errno not in _FULL or item.kind == "blob" or not rotation.make_room(self.folder, self.roots):
                raise
            return self._copy(item)

    def _copy(self, item: items.Item) -> Copy:
        work = self._work = _Work(item.name, time.monotonic())

        def moved(count: int) -> None:
            work.done_bytes += count

        try:
            return self.folder.write(item, moved)
        finally:
            self._work = None
            seconds = time.monotonic() - work.started
            if item.kind == "journal":
                self._rests[item.name] = time.monotonic() + min(RESTS * seconds, LONGEST_REST_SECONDS)

    def _forget_removed(self, here: set[str]) -> None:
        """Drop the copies of what this session saw here and is removed: the next would take it for input again. here  names of all items

        Published checkpoints stay: none is input, and its copy may be the only one. So does all where the lab's folder is gone as a whole.
        """
        if self._remembered and not (self.roots["project"] / "runs" / items.RECORD).is_file():
            self._seen, self._remembered = {}, {}
        for name in self._seen.keys() - here:
            copy = self.folder.newest(name)
            is_kept = not name.startswith("project/") or (copy is not None and copy.kind == "published")
            if not is_kept and not os.path.lexists(items.place_of(name, self.roots)):
                self.folder.drop(name)
                self.record.pop(name, None)
                del self._seen[name]

    # What is said

    def _trouble(self, error: Exception) -> None:
        self._failures += 1
        folder = self.folder.folder
        try:
            self.folder.check()
        except OSError as gone:
            error = gone
        except TakenOver:  # the next round says so
            return
        if isinstance(error, Vanished):
            text = f"{folder} is gone (is the drive still mounted?): nothing is copied until it is back. The work goes on here."
            self._turn("gone", text)
        elif isinstance(error, OSError) and error.errno in _FULL:
            self._turn("full", f"{folder} is full: free some space there; what does not fit is tried again. The work goes on here.")
        elif isinstance(error, OSError | DistillError):
            hint = "; Google Drive says so too when it is full" if isinstance(error, OSError) and error.errno == errno.EIO else ""
            self._turn("failing", f"{folder} cannot be written to ({error}{hint}): it is tried again. The work goes on here.")
        else:
            self._turn("failing", f"copying to {folder} failed ({error!r}): it is tried again. The work goes on here.")

    def _turn(self, state: str, text: str) -> None:
        """Say a change of state, once."""
        if state != self._state:
            self._state = state
            say(text)

    def _watch(self) -> None:
        """Say where a copy crawls, or stands still: the thread that makes it then waits for the drive."""
        while not self.stopped:
            time.sleep(min(SLOW_SECONDS / 10, 1))
            work = self._work
            seconds = time.monotonic() - work.started if work else 0
            if seconds > SLOW_SECONDS and work.done_bytes < SLOW_BYTES_PER_SECOND * seconds:
                self._turn("slow", f"{self.folder.folder} is slow ({work}). The work goes on here.")


def _is_same(item: items.Item, copy: Copy, stamp: tuple) -> bool:
    """Whether an item is what its copy holds; of the hub's gigabytes, name and size tell."""
    if item.kind == "blob":
        ((_, size_bytes, *_),) = stamp
        return size_bytes == copy.size_bytes
    return items.content(item) == copy.files


def _signature(item: items.Item) -> tuple:
    try:
        return items.signature(item)
    except items.SourceChanged:
        return ()


def some(names: list[str], limit: int = 3) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
