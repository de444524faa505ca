"""Numbers that go wrong: found within 20 steps in real trainings, and never where nothing is wrong."""

import json
import math
import re

import pytest

from distill import resume, store, train
from distill.errors import BackendError
from distill.watch import Figures, Watch


def stepped(watched: Watch, figures, scale=None) -> tuple[int, str] | None:
    """Feed figures step by step and look when it is time. Returns the step at which something was found, and what."""
    for step, (loss, norm, rate, skipped) in enumerate(figures, start=1):
        if watched.add(Figures(step, loss, norm, rate, skipped)) and (found := watched.look(scale)):
            return step, found
    return None


def moving():
    """Weights that are others each time."""
    count = iter(range(1, 1000))
    return lambda: [1.0, 1.0 + 0.1 * next(count)]


GOOD = (2.0, 1.0, 1e-3, False)


def test_a_loss_that_is_not_finite_is_found_at_the_next_look():
    for bad in (math.nan, math.inf):
        step, found = stepped(Watch(1e-3, moving(), moved=True), [GOOD] * 11 + [(bad, 1.0, 1e-3, False)] + [GOOD] * 20)
        assert step == 15 and f"the loss of step 12 is {bad} (2 at step 11)" in found and "learning_rate = 0.001. Lower it" in found


def test_a_gradient_that_is_not_finite_is_found_unless_a_scaler_searches_for_its_scale():
    figures = [GOOD] * 3 + [(2.0, math.inf, 1e-3, True)] + [GOOD] * 20
    assert "the gradient norm of step 4 is inf" in stepped(Watch(1e-3, moving()), figures)[1]
    assert stepped(Watch(1e-3, moving(), fp16=True, moved=True), figures) is None


def test_an_explosion_is_found_and_a_spike_or_a_high_level_is_not():
    def with_norms(norms):
        return stepped(Watch(1e-3, moving(), moved=True), [(2.0, norm, 1e-3, False) for norm in norms])

    step, found = with_norms([2.0] * 30 + [5000.0] * 20)
    assert step == 35 and "the gradient norm explodes: 5000 at step 33" in found and "2 was usual" in found and "max_grad_norm" in found
    assert with_norms([2.0] * 30 + [5000.0, 5000.0] + [2.0] * 30 + [5000.0] + [2.0] * 20) is None
    assert with_norms([4000.0, 9000.0, 2000.0] * 20) is None  # usual here
    assert with_norms([1e-7] * 30 + [1e-3] * 20) is None  # a memorised set, then a harder batch


def test_an_explosion_is_found_across_an_interruption_in_its_midst():
    def with_norms(norms, levels=None):
        watched = Watch(1e-3, moving(), moved=True, levels=levels)
        return watched, stepped(watched, [(2.0, norm, 1e-3, False) for norm in norms])

    before, found = with_norms([2.0] * 38 + [5000.0] * 2)
    assert found is None and before.uneasy
    step, found = with_norms([5000.0] * 20, json.loads(json.dumps(before.levels)))[1]
    assert step == 5 and "the gradient norm explodes: 5000 at step 1, the 3. in a row, where 2 was usual" in found
    assert with_norms([5000.0] * 20)[1] is None  # what a watch that has forgotten takes for usual


def test_a_loss_far_above_that_of_guessing_is_found_and_a_high_beginning_or_a_harder_batch_is_not():
    def with_losses(losses):
        return stepped(Watch(1e-3, moving(), moved=True), [(loss, 1.0, 1e-3, False) for loss in losses])

    step, found = with_losses([2.0] * 12 + [60.0] * 8)
    assert step == 15 and "the loss explodes: 60 at step 15" in found and "2 was usual" in found and "learning_rate = 0.001" in found
    assert with_losses([40.0, 30.0, 12.0] + [6.0] * 30 + [15.0] * 30) is None
    assert with_losses([0.001] * 30 + [3.0] * 30) is None  # known by heart, then other rows


def test_weights_that_stay_are_found_after_20_steps_at_a_learning_rate_that_should_move_them():
    still = lambda: [0.5, -0.5]  # noqa: E731
    warm_up = [(2.0 - step / 100, 1.0, 1e-3 * step / 1000, False) for step in range(100)]
    step, found = stepped(Watch(1e-3, still), warm_up + [(2.0 - step / 100, 1.0, 1e-3, False) for step in range(40)])
    assert step == 120 and "nothing moves: after 20 steps" in found and "learning_rate = 0.001" in found
    skipped = [(2.0, math.inf, 1e-3, step % 9 != 0) for step in range(60)]
    assert stepped(Watch(1e-3, still, fp16=True), skipped) is None  # seven steps that count


def test_a_loss_that_stays_to_six_digits_is_found_at_the_beginning_and_allowed_at_the_end():
    assert "the loss is 2 " in stepped(Watch(1e-3, moving()), [GOOD] * 30)[1]
    falling = [(2.0 - step / 100, 1.0, 1e-3, False) for step in range(30)]
    assert stepped(Watch(1e-3, moving()), falling + [(0.7, 1e-9, 1e-3, False)] * 100) is None
    assert stepped(Watch(1e-3, moving()), [(0.0, 0.0, 1e-3, False)] * 100) is None  # known by heart from the start


def test_a_scaler_that_keeps_skipping_is_found_with_a_real_scaler():
    import torch

    weight = torch.nn.Parameter(torch.ones(4))
    optimizer, scaler = torch.optim.SGD([weight], lr=0.1), torch.amp.GradScaler("cpu")
    watched, found, step = Watch(0.1, moving(), fp16=True), None, 0
    while not found and step < 40:
        step += 1
        before = scaler.get_scale()
        scaler.scale((weight * torch.inf).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        figures = Figures(step, torch.tensor(2.0), torch.tensor(torch.inf), 0.1, scaler.get_scale() < before)
        found = watched.look(scaler.get_scale()) if watched.add(figures) else None
    assert step == 10 and "skipped 10 steps in a row, up to step 10" in found and "bf16" in found and "fp16 = false" in found
    assert torch.equal(weight, torch.ones(4))


def test_a_scale_below_one_is_found():
    assert "has come down to 0.5" in stepped(Watch(1e-3, moving(), fp16=True), [GOOD] * 5, scale=0.5)[1]


# Real trainings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"learning_rate": 1.0, "max_grad_norm": 0.0, "optim": "sgd"}, "learning rate that is too high: learning_rate = 1"),
        ({"learning_rate": 1.0}, "the loss explodes"),
        ({"learning_rate": 1e-9}, "nothing moves"),
    ],
)
def test_a_training_is_stopped_within_20_steps_with_cause_and_setting(tmp_path, make_job, prepared_rows, settings, words):
    shape = {"warmup_ratio": 0.0, "lr_scheduler_type": "constant", "logging_steps": 1000, "num_epochs": 20, "save_steps": 1}
    job = make_job(tmp_path, prepared_rows[:128], **shape, **settings)
    with pytest.raises(BackendError, match="Training failed: BackendError: The training was stopped at step") as caught:
        train.run(job, tmp_path / "run", "test")
    assert words in str(caught.value)
    assert int(str(caught.value).split("stopped at step ")[1].split(":")[0]) <= 20
    assert not (tmp_path / "out").exists()
    kept = [folder for folder in resume.saved(tmp_path / "run" / "checkpoints") if store.read_manifest(folder)]
    assert kept and f"The last good training checkpoint is {store.shown(kept[-1])}" in str(caught.value)


def test_no_sealed_save_follows_a_bad_number(tmp_path, make_job, prepared_rows):
    """Saved at every step: what lies there at the stop is from before the step whose numbers were bad."""
    import torch
    from safetensors.torch import load_file

    settings = {"learning_rate": 1.0, "max_grad_norm": 0.0, "optim": "sgd", "warmup_ratio": 0.0, "save_steps": 1, "num_epochs": 20}
    with pytest.raises(BackendError):
        train.run(make_job(tmp_path, prepared_rows[:128], lr_scheduler_type="constant", **settings), tmp_path / "run", "test")
    kept = [folder for folder in resume.saved(tmp_path / "run" / "checkpoints") if store.read_manifest(folder)]
    assert kept
    for folder in kept:
        assert all(torch.isfinite(values).all() for values in load_file(folder / "model.safetensors").values())


def test_what_is_saved_while_the_loss_explodes_is_not_gone_on_from(tmp_path, make_job, prepared_rows):
    settings = {"learning_rate": 1.0, "warmup_ratio": 0.0, "lr_scheduler_type": "constant", "num_epochs": 20, "save_steps": 1}
    with pytest.raises(BackendError, match="the loss explodes") as caught:
        train.run(make_job(tmp_path, prepared_rows[:128], **settings), tmp_path / "run", "test")
    third = int(re.search(r"at step (\d+), the 3\. in a row", str(caught.value))[1])
    left = resume.saved(tmp_path / "run" / "checkpoints")
    sealed = [folder for folder in left if store.read_manifest(folder)]
    assert [resume.step_of(folder) for folder in left[-3:]] == [third - 3, third - 2, third - 1]
    # the first loss that exploded, that of step third - 2, is that of the weights after step third - 3
    assert resume.step_of(sealed[-1]) == third - 4 and store.shown(sealed[-1]) in str(caught.value)
    key = store.read_manifest(sealed[-1])["resume_key"]
    assert resume.claim(tmp_path / "run" / "checkpoints", key)[0] == sealed[-1]


def test_a_set_that_is_known_by_heart_and_a_warm_up_from_zero_are_trained_to_the_end(tmp_path, make_job):
    rows = [{"instruction": "Is 1234 even or odd?", "output": "even"}]
    job = make_job(tmp_path, rows, max_steps=120, save_steps=60, warmup_ratio=0.3, learning_rate=1e-2)
    result = train.run(job, tmp_path / "run", "test")
    assert result.metrics["steps"] == 120 and result.metrics["last_loss"] < 1e-3
