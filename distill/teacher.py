"""Does a teacher fit? Its memory and its download against what is there; in how many bits it is held, and how much it is asked at once.

Pure arithmetic, as in `preflight`. What you ask for is kept or refused, never changed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from .errors import PreflightError
from .generation import BATCH_TOKENS
from .memory import GIB, Asking, Need, asking_need
from .preflight import Machine
from .shapes import Shape

BITS = (8, 4)  # in the order in which they are tried


@dataclass(frozen=True)
class TeacherFit:
    """How a teacher is held and asked: (value, reason) of both, and the memory that it takes."""

    bits: tuple[int, str]
    batch_tokens: tuple[int, str]
    need: Need


def choose_teacher(
    shape: Shape,
    question_tokens: int,
    max_new_tokens: int,
    machine: Machine,
    bits: int | None = None,
    batch_size: int | None = None,
    download_bytes: float = 0,
) -> TeacherFit:
    """A teacher's bits and batches: 8 bits where they fit, else 4; batches as large as memory allows, at most BATCH_TOKENS.

    question_tokens  of the longest question, `max_new_tokens` of an answer
    bits             those that you ask for, 4, 8, 16 or 32; None leaves the choice
    batch_size       questions at once that you ask for; None leaves the choice
    download_bytes   of a teacher that the hub's cache does not hold yet
    Raises PreflightError with the figures where not even one question at a time fits, or the download does not.
    """
    one = question_tokens + max_new_tokens
    sizes = [batch_size * one] if batch_size else list(_batches(one))
    check_download(download_bytes, machine)
    for wanted in (bits,) if bits else BITS:
        for tokens in sizes:
            need = asking_need(shape, Asking(wanted, tokens, tokens // one, machine.gpu))
            if need.gib <= machine.free_gib:
                return TeacherFit((wanted, _bits_reason(wanted, bits)), (tokens, f"{tokens // one} questions at once"), need)
    fewest = bits or BITS[-1]
    fewer = " or ".join(str(each) for each in reversed(BITS) if each < fewest)
    least = asking_need(shape, Asking(fewest, sizes[-1], sizes[-1] // one, machine.gpu))
    raise PreflightError(
        f"The teacher does not fit: in {fewest} bits it needs {least.gib:.1f} GiB ({least.listed()}) for {sizes[-1] // one} at once of "
        f"{question_tokens:,} tokens and {max_new_tokens:,} of an answer, and {machine.name} has {machine.free} free. "
        f"{f'Ask for {fewer} bits' if fewer else 'Take a smaller teacher'}, or a teacher behind an API. "
        "A smaller batch_size or max_new_tokens takes less."
    )


def check_served(shape: Shape, question_tokens: int, max_new_tokens: int, machine: Machine, download_bytes: float = 0) -> None:
    """Raise PreflightError where a teacher does not fit that a server holds as it is stored: in 16 bits on a GPU, in 32 on a CPU."""
    check_download(download_bytes, machine)
    bits = 16 if machine.gpu else 32
    need = asking_need(shape, Asking(bits, question_tokens + max_new_tokens, 1, machine.gpu))
    if need.gib > machine.free_gib:
        raise PreflightError(
            f"The teacher cannot be served here: in {bits} bits it needs {need.gib:.1f} GiB ({need.listed()}), and {machine.name} has "
            f"{machine.free} free. Give its name alone (no Endpoint, no --serve): it is then held in 8 bits or 4. Or take a smaller "
            "teacher, or the base_url of a server that runs elsewhere."
        )


def check_download(download_bytes: float, machine: Machine) -> None:
    """Raise PreflightError where the disk of the hub's cache has no room for a model that has still to come."""
    for disk in machine.disks:
        if "HF_HOME" in disk.places and download_bytes / GIB > disk.free_gib:
            raise PreflightError(
                f"The teacher's download takes {download_bytes / GIB:.1f} GiB of disk, and {disk.free_gib:.1f} GiB are free where the "
                "hub's cache lies. Free some space, or set HF_HOME to a folder on another disk."
            )


def _batches(one: int) -> Iterator[int]:
    """Tokens of a batch, halved from BATCH_TOKENS down to one question's."""
    tokens = max(BATCH_TOKENS, one)
    yield tokens
    while tokens > one:
        tokens = max(one, tokens // 2)
        yield tokens


def _bits_reason(taken: int, asked: int | None) -> str:
    if asked:
        return "asked for"
    return "fits" if taken == BITS[0] else f"{BITS[0]} bits do not fit"
