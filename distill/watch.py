"""Numbers that go wrong in a training: each is found within 20 optimizer steps, whatever is logged, and named with its likely cause.

Figures stay on the device and are looked at LOOK_STEPS at a time, and before every save, so that no step waits for a GPU and nothing
that is damaged is saved.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LOOK_STEPS = 5
USUAL_STEPS = 50  # whose median is what is usual
EXPLODED_STEPS = 3  # in a row: a single spike is clipped and forgotten
# (times what is usual, and above this in any case); to guess among 150,000 tokens costs 12 nats
EXPLODED = {"gradient norm": (100, 1e3), "loss": (3, 20)}
SKIPPED_STEPS = 10  # a scaler that starts at 65,536 finds its scale within a few
STILL_STEPS = 20
STILL_CHANGE = 1e-6  # of the weights' size; fp32 tells 6e-8 apart
STILL_LOSS = 1e-4  # below, a loss says no more than that the rows are known by heart


@dataclass(frozen=True)
class Figures:
    """What an optimizer step was: loss and gradient norm (before clipping) may be tensors on the device.

    skipped  whether the fp16 scaler left the weights as they were
    """

    step: int
    loss: float
    norm: float
    learning_rate: float
    skipped: bool = False


class _Level:
    """What is usual of a figure, and for how many steps in a row it has been far above that.

    state  that of an earlier session's level
    """

    def __init__(self, name: str, state: dict) -> None:
        self.name, (self.ratio, self.floor) = name, EXPLODED[name]
        self.values: deque[float] = deque(state.get("values", ()), maxlen=USUAL_STEPS)
        self.above = state.get("above", 0)

    @property
    def state(self) -> dict:
        return {"values": list(self.values), "above": self.above}

    def add(self, value: float, step: int) -> str | None:
        """Take a finite value. Returns in words that it explodes."""
        usual = statistics.median(self.values) if self.values else math.inf
        self.above = self.above + 1 if value > max(self.ratio * usual, self.floor) else 0
        if not self.above:
            self.values.append(value)
        if self.above < EXPLODED_STEPS:
            return None
        return f"the {self.name} explodes: {value:.4g} at step {step}, the {self.above}. in a row, where {usual:.3g} was usual"


class Watch:
    """Takes the figures of every step and says what is wrong with them.

    peak_rate  the learning rate of the settings; a step below a tenth of it is warm-up or the schedule's end, and need not move anything
    weights    gives some values of the trained weights, the same ones each time
    fp16       whether a gradient scaler is at work, to which infinite gradients are a part of its search
    moved      whether an earlier session has seen the weights move
    levels     what was usual in an earlier session, as its `levels` said: an explosion must not become usual by going on in its midst
    """

    def __init__(
        self,
        peak_rate: float,
        weights: Callable[[], Sequence[float]],
        fp16: bool = False,
        moved: bool = False,
        levels: dict | None = None,
    ) -> None:
        self.peak_rate, self.weights, self.fp16, self.moved = peak_rate, weights, fp16, moved
        self.first = None if moved else weights()
        self.losses: list[float] = []  # of the steps that should have moved the weights
        self.loss, self.norm = (_Level(name, (levels or {}).get(name, {})) for name in ("loss", "gradient norm"))
        self.skipped = 0  # steps in a row
        self.last_good = "none before it"
        self.calm_step = 0  # the last one whose figures were as usual
        self.pending: list[Figures] = []

    def add(self, figures: Figures) -> bool:
        """Take a step's figures. Returns whether it is time to look."""
        self.pending.append(figures)
        return figures.step % LOOK_STEPS == 0

    def look(self, scale: float | None = None) -> str | None:
        """What is wrong, in words, with the figures since the last look; None where nothing is.

        scale  the gradient scaler's, where there is one
        """
        pending, self.pending = self.pending, []
        for figures in pending:
            loss, norm = float(figures.loss), float(figures.norm)
            if found := self._not_finite(figures, loss, norm) or self._explosion(figures.step, loss, norm) or self._skipping(figures):
                return found
            self.last_good = f"{loss:.4g} at step {figures.step}"
            self.calm_step = self.calm_step if self.uneasy else figures.step
            if figures.learning_rate >= self.peak_rate / 10 and not figures.skipped and not self.moved:
                self.losses.append(loss)
        if scale is not None and scale < 1:
            return _of_fp16(f"the fp16 scaler has come down to {scale:.3g}")
        return self._stillness(pending[-1].step) if pending and not self.moved else None

    @property
    def uneasy(self) -> bool:
        """Whether the last steps may be the first of something that goes wrong: no state to go on from."""
        return bool(self.loss.above or self.norm.above)

    @property
    def levels(self) -> dict[str, dict]:
        """What is usual, as JSON holds it."""
        return {level.name: level.state for level in (self.loss, self.norm)}

    def _not_finite(self, figures: Figures, loss: float, norm: float) -> str | None:
        if not math.isfinite(loss):
            return self._of_rate(f"the loss of step {figures.step} is {loss} ({self.last_good})")
        if not math.isfinite(norm) and not self.fp16:
            return self._of_rate(f"the gradient norm of step {figures.step} is {norm} (loss: {self.last_good})")
        return None

    def _explosion(self, step: int, loss: float, norm: float) -> str | None:
        # an infinite norm is the fp16 scaler's affair
        found = self.loss.add(loss, step) or (self.norm.add(norm, step) if math.isfinite(norm) else None)
        return found and self._of_rate(found)

    def _skipping(self, figures: Figures) -> str | None:
        self.skipped = self.skipped + 1 if figures.skipped else 0
        if self.skipped < SKIPPED_STEPS:
            return None
        return _of_fp16(f"the fp16 scaler skipped {self.skipped} steps in a row, up to step {figures.step}: their gradients overflow")

    def _stillness(self, step: int) -> str | None:
        if len(self.losses) < STILL_STEPS:
            return None
        before, now = self.first, self.weights()
        size = math.hypot(*before) or 1
        change = math.dist(before, now) / size
        same_loss = len({f"{loss:.6g}" for loss in self.losses}) == 1 and self.losses[-1] > STILL_LOSS
        self.moved = change >= STILL_CHANGE and not same_loss
        if self.moved:
            self.first, self.losses = None, []
            return None
        return (
            f"nothing moves: after {len(self.losses)} steps, up to step {step}, the trained weights have changed by {change:.1e} of their "
            f"size and the loss is {self.losses[-1]:.6g} (it was {self.losses[0]:.6g}). The likely cause is a learning rate that is too "
            f"low: learning_rate = {self.peak_rate:g}. Usual: 1e-5 to 5e-5 for full fine-tuning, ten times as much for LoRA"
        )

    def _of_rate(self, what: str) -> str:
        half = " In fp16, take bf16 or fp32 (fp16 = false)." if self.fp16 else ""
        return (
            f"{what}. The likely cause is a learning rate that is too high: learning_rate = {self.peak_rate:g}. Lower it to a tenth, warm "
            f"up longer (warmup_ratio = 0.1), or clip harder (max_grad_norm = 1).{half} If that does not help, look for rows of garbage in "
            "the data"
        )


def _of_fp16(what: str) -> str:
    return f"{what}. Take bf16 where the GPU has it, or fp32 (fp16 = false); a lower learning_rate may help too"
