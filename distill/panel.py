"""Who is asked in an evaluation: the teacher, each student as it was and as it is; refused before anybody is asked where that cannot be."""

from pathlib import Path

from . import models, prompt, store
from .config import model_name
from .errors import ConfigError
from .examine import Examined
from .models import check_student
from .students import TITLES, Student, student_at


def check_arguments(seed, limit, teacher_bits, speed_runs, max_new_tokens) -> None:
    """Raise ConfigError for arguments that cannot work, all of them at once, before anybody is asked."""
    numbers = {"seed": (seed, 0), "speed_runs": (speed_runs, 0), "limit": (limit, 1)}
    numbers |= (
        {f"max_new_tokens[{mode!r}]": (limit, 1) for mode, limit in max_new_tokens.items()} if isinstance(max_new_tokens, dict) else {}
    )
    problems = [
        f"{name} = {value!r}: give a whole number from {least}."
        for name, (value, least) in numbers.items()
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least)
    ]
    if max_new_tokens is not None and (not isinstance(max_new_tokens, dict) or max_new_tokens.keys() - set(prompt.MODES)):
        problems.append(f"max_new_tokens = {max_new_tokens!r}: write e.g. {{'system1': 256, 'system2': 1024}}.")
    if teacher_bits not in (None, *models.BITS):
        problems.append(f"teacher_bits = {teacher_bits!r}: is not one of {', '.join(map(str, models.BITS))}.")
    if problems:
        raise ConfigError.from_problems("the evaluation", problems)


def students_of(checkpoints: tuple, mode: str | None, before: str | Path | None) -> list[Student]:
    """The students to examine, System 1 first."""
    if len(checkpoints) > 1 and (mode or before):
        raise ConfigError("mode and before are of one student: evaluate a checkpoint that the lab did not make by itself.")
    if not checkpoints:
        raise ConfigError("There is no student to evaluate: give the folder that a distillation returned, or two of them.")
    found = [student_at(path, mode, before) for path in checkpoints]
    modes = [student.mode for student in found]
    if len(set(modes)) < len(modes):
        raise ConfigError(f"{len(modes)} students of {modes[0]}: one report takes one of each system. Evaluate them one by one.")
    if unknown := [student.path for student in found if not student.before]:
        raise ConfigError(f"{store.shown(unknown[0])} does not say what it was before its training. Give before = its base model.")
    return sorted(found, key=lambda student: prompt.MODES.index(student.mode))


def panel_of(examined: list[Student], teacher: str | None, bits: int | None) -> list[Examined]:
    """Everybody who is asked: the teacher, then each student as it was and as it is."""
    name = teacher or examined[0].record.get("job", {}).get("models", {}).get("teacher")
    if not name:
        raise ConfigError("The students do not say who their teacher is. Give teacher = its folder or hub name.")
    path = model_name(name)
    models.check_model(path, "teacher")
    panel = [Examined("teacher", "teacher", "Teacher", path, tuple(student.mode for student in examined), bits)]
    for student in examined:
        _check_before(student)
        title = TITLES[student.mode]
        panel.append(Examined(f"before_{student.mode}", "before", f"{title} before", student.before, (student.mode,)))
        panel.append(Examined(student.mode, "after", title, student.path, (student.mode,)))
    return panel


def _check_before(student: Student) -> None:
    """Raise ConfigError where what a student was before cannot be asked."""
    try:
        check_student(student.before)
    except ConfigError as error:
        raise ConfigError(
            f"What {store.shown(student.path)} was before its training cannot be asked: {error} Give before = where that model lies now."
        ) from error
