"""Training checkpoints that a killed training goes on from: sealed with checksums, found again, kept as long as they serve.

A training that goes on ends, on a CPU, with the weights and figures of one that was never interrupted, bit for bit. So a checkpoint
holds, besides transformers' own state, the sums that a logged figure is made of; and what is saved by the clock is saved for going on
alone: it is never evaluated and never a candidate for the best checkpoint.
"""

import json
import re
import shutil
import time
from pathlib import Path

from . import store
from .errors import BackendError, DataError
from .rotation import KEPT_CHECKPOINTS as KEPT
from .watch import Figures, Watch

SAVE_SECONDS = 180  # the most between two saves: leaves two of the five minutes for a validation and the saving itself
SHORTEST_SAVE_SECONDS = 10
SAVING_SHARE = 0.05
STATE = "lab_state.json"
PICKLE = "training_args.bin"
PARTS = {"engine_sha256": "engine code", "tokens_sha256": "rows"}  # of `checkpoint.identity`, in words
NOT_THE_MODEL = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", STATE, store.MANIFEST)


def pause_after(save_seconds: float) -> tuple[float, str]:
    """Seconds from one save to the next, where one takes `save_seconds`; and why."""
    wanted = save_seconds * (1 / SAVING_SHARE - 1)
    pause = min(SAVE_SECONDS, max(SHORTEST_SAVE_SECONDS, wanted))
    if wanted > SAVE_SECONDS:
        return pause, f"a save takes {save_seconds:.1f} s, and no more work than that may be lost"
    return pause, f"a save takes {save_seconds:.1f} s, at most {SAVING_SHARE:.0%} of the time"


# Finding


def claim(checkpoints: Path, key: str, made_of: dict | None = None) -> tuple[Path | None, list[str]]:
    """The training checkpoint to go on from, the last whole one of a job; and what is to be said of those that cannot be used.

    key      the job's `checkpoint.resume_key`
    made_of  the job's `checkpoint.identity`, to tell how another job differs
    Nothing whole is removed: what another job sealed stays until this one has sealed one of its own.
    """
    problems = []
    for folder in reversed(saved(checkpoints)):
        if problem := _problem(folder, key, made_of or {}):
            problems.append(f"{folder.name} cannot be gone on from: {problem}")
    whole = sealed(checkpoints, key)
    if whole and (problem := _problem_of_best(whole[-1], key)):
        problems.append(problem)
    return (whole[-1] if whole else None), problems


def saved(checkpoints: Path) -> list[Path]:
    """The training checkpoints in a folder, by step."""
    return sorted(checkpoints.glob("checkpoint-[0-9]*"), key=step_of)


def sealed(checkpoints: Path, key: str) -> list[Path]:
    """A job's own training checkpoints in a folder that were saved to their end, by step."""
    return [folder for folder in saved(checkpoints) if _key_of(folder) == key]


def _key_of(folder: Path) -> str | None:
    """The `resume_key` that a training checkpoint is sealed with; None where no seal can be read."""
    try:
        manifest = store.read_json(folder / store.MANIFEST)
    except DataError:
        return None
    return manifest.get("resume_key") if isinstance(manifest, dict) else None


def rotate(checkpoints: Path, key: str, kept: int = KEPT) -> None:
    """Keep a job's last checkpoints, and those that were the best by one of them: it may have to serve without its successor.

    Called when the job has sealed one; what another job sealed goes.
    """
    own = sealed(checkpoints, key)
    best = {_best_of(folder) for folder in own[-kept:]}
    needless = [folder for folder in own[:-kept] if step_of(folder) not in best]
    others = [folder for folder in saved(checkpoints) if (folder / store.MANIFEST).is_file() and folder not in own]
    for folder in needless + others:
        shutil.rmtree(folder)


def step_of(folder: Path) -> int:
    """The step after which a training checkpoint was saved."""
    return int(re.fullmatch(r"checkpoint-(\d+)", folder.name)[1])


def _problem(folder: Path, key: str, made_of: dict) -> str | None:
    """Why a job cannot go on from a training checkpoint; one that is of no use to any job is emptied.

    Its folder stays: with a folder that is gone go its copies elsewhere, which may be whole.
    """
    try:
        manifest = store.read_manifest(folder)
    except DataError as error:
        store.empty_folder(folder)
        return str(error)
    if manifest is None:
        store.empty_folder(folder)
        return "it was not saved to its end."
    return None if manifest.get("resume_key") == key else _other_job(manifest, made_of)


def _other_job(manifest: dict, made_of: dict) -> str:
    """What is said of another job's training checkpoint. manifest, made_of  as it was sealed, and as this job's would be"""
    differing = [words for name, words in PARTS.items() if name in manifest and manifest[name] != made_of.get(name)]
    others = " and ".join(differing) or "its settings or its student"
    return f"another job made it, with other {others}. It stays until this training has saved one of its own."


def _problem_of_best(folder: Path, key: str) -> str | None:
    """What is to be said where the best checkpoint so far, which the training may publish, is not whole."""
    best = _best_of(folder)
    if best is None or _key_of(folder.with_name(f"checkpoint-{best}")) == key:
        return None
    left = _best_left(folder, key)
    instead = f"checkpoint-{left['step']} is the best of those that are left" if left else "the next validation begins anew"
    return f"the best one so far was checkpoint-{best}, which is damaged or missing: {instead}."


def _best_left(folder: Path, key: str) -> dict | None:
    """The best validation up to a training checkpoint whose own checkpoint is there: {"step", "eval_loss", …}; None where none is."""
    steps = {step_of(one) for one in sealed(folder.parent, key)}
    history = store.read_json(folder / "trainer_state.json")["log_history"]
    validated = [entry for entry in history if "eval_loss" in entry and entry["step"] in steps]
    return min(validated, key=lambda entry: entry["eval_loss"], default=None)


def _best_of(folder: Path) -> int | None:
    """The step of the best checkpoint so far, by a training checkpoint."""
    return store.read_json(folder / "trainer_state.json")["best_global_step"]


def cut_off(journal: Path, step: int) -> int:
    """Take off a journal what is behind a step, so that it reads as if the training had not gone further. Returns its last step before.

    What stands behind a damaged line is taken off too: no checkpoint depends on these figures.
    """
    if not journal.is_file():
        return 0
    entries = [_entry(line) for line in journal.read_bytes().rpartition(b"\n")[0].splitlines()]
    intact = entries
    if None in entries:
        intact = entries[: entries.index(None)]
        print(f"{store.shown(journal)}: line {len(intact) + 1:,} is damaged; it and what follows it is dropped")
    kept = [entry for entry in intact if entry["step"] <= step and "train_runtime" not in entry]
    if kept:
        store.write_jsonl(journal, kept)
    else:
        journal.unlink()
    return max((entry["step"] for entry in entries if entry), default=0)


def _entry(line: bytes) -> dict | None:
    """What a journal's line holds; None where it is damaged."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None


# Saving


def kept_last(training: dict) -> int:
    """How many of its last checkpoints a training keeps, besides the best.

    training  a job's block; `save_total_limit` may ask for more than are needed
    """
    return max(KEPT, training.get("save_total_limit", 0))


class ResumableTrainer:
    """What TRL's SFTTrainer lacks to be killed at any moment, to run out of memory and to notice bad numbers; stands before it as a base.

    resume_key  of the job, sealed into every checkpoint
    made_of     the job's `checkpoint.identity`, sealed too
    kept        how many of the last checkpoints are kept, besides the best
    """

    resume_key = ""
    made_of: dict = {}
    kept = KEPT

    def __init__(self, *arguments, **named) -> None:
        super().__init__(*arguments, **named)
        self.began = self.saved_at = time.monotonic()
        self.pause_seconds: float = SHORTEST_SAVE_SECONDS
        self.seconds_before, self.sessions = 0.0, []
        self.step_loss = self.step_norm = self.sums_before_step = None
        self.stepped, self.in_step, self.has_saved = 0, False, False
        self.unsealed: list[Path] = []  # saved when the watch was uneasy
        self.add_callback(_beginning(self))

    def begin(self) -> None:
        """Go on where the checkpoint stood that is resumed from; called when transformers has set everything to the beginning."""
        state, folder = {}, self._folder_of(self.state.global_step)
        if self.state.global_step:
            state = store.read_json(folder / STATE)
            self._set_sums(state["sums"])
            self._initial_global_step = 0
            self._find_best(folder)
        self.seconds_before = state.get("seconds", 0.0)
        self.sessions = [*state.get("sessions", []), self.state.global_step]
        self.stepped, self.began = self.state.global_step, time.monotonic()
        self.saved_at = self.began
        moved, levels = state.get("moved", False), state.get("levels")
        self.watch = Watch(self.args.learning_rate, self._some_weights, self.args.fp16, moved, levels)

    def _find_best(self, folder: Path) -> None:
        """Name the best checkpoint so far where it lies now; of those that are left, where it is lost."""
        if self.state.best_global_step and _problem_of_best(folder, self.resume_key):
            left = _best_left(folder, self.resume_key) or {}
            self.state.best_global_step, self.state.best_metric = left.get("step"), left.get("eval_loss")
        best = self.state.best_global_step
        self.state.best_model_checkpoint = str(self._folder_of(best)) if best else None

    def _seconds_until(self, moment: float) -> float:
        """Seconds that all sessions have trained until a moment of the monotonic clock."""
        return self.seconds_before + moment - self.began

    def _folder_of(self, step: int) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{step}"

    # Figures that are summed up between two logged lines; transformers and TRL forget them

    def _sums(self) -> dict:
        return {
            "loss": self._tr_loss.clone(),
            "loss_total": self._total_loss_scalar,
            "logged_step": self._globalstep_last_logged,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
            "tokens": self._total_train_tokens,
            "operations": self.current_flos,
        }

    def _set_sums(self, sums: dict) -> None:
        self._tr_loss = 0 * self._tr_loss + sums["loss"]
        self._total_loss_scalar, self._globalstep_last_logged = sums["loss_total"], sums["logged_step"]
        self._metrics["train"].clear()
        self._metrics["train"].update(sums["metrics"])
        self._total_train_tokens, self.current_flos = sums["tokens"], sums["operations"]

    # A step

    def get_batch_samples(self, *arguments, **named):
        """The first thing in a step: what is summed up then is what a training without this step would have."""
        found = super().get_batch_samples(*arguments, **named)
        self.sums_before_step, self.step_loss, self.in_step = self._sums(), 0.0, True
        return found

    def training_step(self, *arguments, **named):
        """One micro-batch, forward and backward."""
        loss = super().training_step(*arguments, **named)
        self.step_loss = self.step_loss + loss
        return loss

    def _get_grad_norm(self, *arguments, **named):
        self.step_norm = super()._get_grad_norm(*arguments, **named)
        self.in_step = False  # the optimizer comes next
        return self.step_norm

    def _maybe_log_save_evaluate(self, *arguments, learning_rate=None, **named) -> None:
        """What follows each step, and each epoch."""
        if self.state.global_step > self.stepped:
            self.stepped = self.state.global_step
            skipped = self.accelerator.optimizer_step_was_skipped
            if self.watch.add(Figures(self.stepped, self.step_loss, self.step_norm, learning_rate, skipped)) or self.unsealed:
                self._look()
            if self._is_time_to_save():
                self._look()
                self.control.should_save |= not self.watch.uneasy
        super()._maybe_log_save_evaluate(*arguments, learning_rate=learning_rate, **named)

    def _is_time_to_save(self) -> bool:
        """Whether the clock asks for a save; never at an epoch's or the training's end, whose own save and evaluation would be skipped."""
        at_an_end = self.state.epoch % 1 == 0 or self.control.should_training_stop
        return not at_an_end and time.monotonic() - self.saved_at >= self.pause_seconds

    def _look(self) -> None:
        scaler = self.accelerator.scaler
        if problem := self.watch.look(scaler.get_scale() if scaler else None):
            self._unseal_bad()
            raise BackendError(f"The training was stopped at step {self.stepped}: {problem}.")
        if self.unsealed and not self.watch.uneasy:
            self._seal()

    def _some_weights(self) -> list[float]:
        """Up to 64 values of each tensor that is trained."""
        import torch

        trained = (parameter.detach().flatten() for parameter in self.model.parameters() if parameter.requires_grad)
        return torch.cat([values[:: max(1, len(values) // 64)][:64].float() for values in trained]).tolist()

    # A save

    def _save_checkpoint(self, model, trial) -> None:
        """Save, seal, and only then remove what is not needed any more.

        What is saved when the watch is uneasy is sealed once that has passed: until then nobody goes on from it.
        """
        self._look()
        started, folder = time.monotonic(), self._folder_of(self.state.global_step)
        store.empty_folder(folder)
        super()._save_checkpoint(model, trial)
        (folder / PICKLE).unlink(missing_ok=True)
        sums = self._sums()
        state = {
            "seconds": round(self._seconds_until(started), 3),
            "sessions": self.sessions,
            "moved": self.watch.moved,
            "levels": self.watch.levels,
            "sums": {**sums, "loss": sums["loss"].item()},
        }
        store.write_json(folder / STATE, state)
        self.unsealed.append(folder)
        if not self.watch.uneasy:
            self._seal()
        self.saved_at = time.monotonic()
        self.pause_seconds, reason = pause_after(self.saved_at - started)
        if not self.has_saved:
            print(f"saves by the clock: every {self.pause_seconds:.0f} s ({reason})")
        self.has_saved = True

    def _seal(self) -> None:
        for folder in self.unsealed:
            store.write_manifest(folder, {**self.made_of, "resume_key": self.resume_key})
        self.unsealed.clear()
        rotate(Path(self.args.output_dir), self.resume_key, self.kept)

    def _unseal_bad(self) -> None:
        """Let nobody go on from weights that gave the first bad figures: a step's loss is that of the weights before it."""
        bad_from = max(self.watch.calm_step, self.sessions[-1])
        for folder in sealed(Path(self.args.output_dir), self.resume_key):
            if step_of(folder) >= bad_from:
                (folder / store.MANIFEST).unlink()

    def rescue(self) -> None:
        """Save the last finished step after a forward or backward has run out of memory; elsewhere the weights may be half of a step's."""
        self.model.zero_grad(set_to_none=True)
        is_saved = (self._folder_of(self.state.global_step) / store.MANIFEST).is_file()
        if self.in_step and self.state.global_step and not is_saved:
            self._set_sums(self.sums_before_step)
            self._save_checkpoint(self.model, None)

    # What transformers does otherwise

    def _run_epoch(self, **named) -> None:
        if self.state.global_step < self.state.max_steps:  # killed between the last step and the publication; it would add a step
            super()._run_epoch(**named)

    def _finalize_training(self, trial, num_train_samples, start_time):
        # transformers takes the difference of two wall-clock times, and that clock may have been set back in between
        return super()._finalize_training(trial, num_train_samples, time.time() - self._seconds_until(time.monotonic()))

    def _load_scaler(self, checkpoint) -> None:
        if self.accelerator.scaler:  # none where another GPU goes on in bf16
            super()._load_scaler(checkpoint)

    def prediction_step(self, model, inputs, *arguments, **named):
        """One batch of a validation; its tokens are counted."""
        found = super().prediction_step(model, inputs, *arguments, **named)
        self.validated.append((found[0], (inputs["labels"][..., 1:] != -100).sum()))
        return found

    def evaluation_loop(self, *arguments, **named):
        """A validation, whose loss is the mean over all tokens: a mean of batches' means would go by how many rows fit into memory."""
        self.validated = []
        output = super().evaluation_loop(*arguments, **named)
        tokens = sum(count.item() for _, count in self.validated)
        output.metrics["eval_loss"] = sum(loss.item() * count.item() for loss, count in self.validated) / tokens
        return output


def _beginning(trainer: ResumableTrainer):
    from transformers import TrainerCallback

    class Beginning(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            trainer.begin()

    return Beginning()
