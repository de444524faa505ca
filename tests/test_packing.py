"""Packing: every row in one pack, whole, learning what it would learn alone and seeing no other row."""

from pathlib import Path

import pytest

from distill import store, train, trainer
from distill.checkpoint import RUN_RECORD
from distill.errors import DataError
from distill.models import load_to_train

ATTENTIONS = ("eager", "sdpa")
MAX_LENGTH = 128


@pytest.fixture(scope="module")
def rows(prepared_rows) -> list[dict]:
    """Rows of quite different lengths."""
    return [{**row, "output": f"{row['output']} " * (number % 7 + 1)} for number, row in enumerate(prepared_rows[:40])]


@pytest.fixture
def make_trainer(tmp_path, make_job, rows, micro):
    """A trainer over all rows, packed or not, and the one batch that holds them all."""

    def make(packing: bool, attention: str):
        settings = {"packing": True} if packing else {"group_by_length": False}
        job = store.read_json(make_job(tmp_path, rows, max_length=MAX_LENGTH, **settings))
        data = trainer.datasets(Path(job["dataset"]["labeled_path"]), tmp_path / "cache")
        student = load_to_train(str(micro / "student_system1"), attention=attention)
        made = trainer.build_trainer(job, "fp32", student, data, tmp_path / "checkpoints", [])
        return made, made.data_collator(list(made.train_dataset))

    return make


def test_every_row_is_in_one_pack_and_whole(make_trainer, rows):
    made, _ = make_trainer(True, "eager")
    plain, _ = make_trainer(False, "eager")
    found = []
    for pack in made.train_dataset:
        assert len(pack["input_ids"]) == len(pack["labels"]) == sum(pack["seq_lengths"]) <= MAX_LENGTH
        start = 0
        for length in pack["seq_lengths"]:
            found.append((pack["input_ids"][start : start + length], pack["labels"][start : start + length]))
            start += length
    assert sorted(found) == sorted((row["input_ids"], row["labels"]) for row in plain.train_dataset)
    assert len(found) == len(rows) and len(made.train_dataset) < len(rows) / 2


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_packed_rows_have_the_loss_and_gradient_that_they_have_unpacked(make_trainer, attention):
    found = {}
    for packing in (True, False):
        made, batch = make_trainer(packing, attention)
        assert ("attention_mask" in batch) is not packing and ("position_ids" in batch) is packing
        made.model.train()  # as in training: gradients, and no cache
        loss = made.compute_loss(made.model, batch)
        loss.backward()
        found[packing] = loss.item(), {name: parameter.grad for name, parameter in made.model.named_parameters()}
    assert found[True][0] == pytest.approx(found[False][0], abs=1e-5)
    for name, gradient in found[True][1].items():
        assert (gradient - found[False][1][name]).abs().max() <= 1e-5 * max(1, gradient.abs().max().item()), name
        assert gradient.abs().max() > 1e-5, name


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_changing_one_row_leaves_the_others_logits_as_they_were(make_trainer, attention):
    import torch

    made, batch = make_trainer(True, attention)
    inputs = {name: value for name, value in batch.items() if name != "labels"} | {"use_cache": False}
    starts = batch["cu_seq_lens_q"].tolist()
    first, end = starts[4], starts[5]
    changed = {**inputs, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, first:end] = (changed["input_ids"][0, first:end] + 7) % 100
    masked = {"attention_mask": torch.ones_like(batch["input_ids"])}  # what must never be passed: it lets every row see all before
    with torch.no_grad():
        moved = (made.model(**changed).logits - made.model(**inputs).logits)[0].abs().amax(-1)
        leaked = (made.model(**changed, **masked).logits - made.model(**inputs, **masked).logits)[0].abs().amax(-1)
    assert moved[:first].max() <= 1e-5 and moved[end:].max() <= 1e-5 < 0.1 < moved[first:end].max()
    assert leaked[end:].max() > 0.01  # so this test can fail


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_packed_row_has_the_logits_that_it_has_alone(make_trainer, attention):
    import torch

    made, batch = make_trainer(True, attention)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    starts = batch["cu_seq_lens_q"].tolist()
    with torch.no_grad():
        together = made.model(**inputs, use_cache=False).logits[0]
        for start, end in zip(starts, starts[1:], strict=False):
            alone = made.model(batch["input_ids"][:, start:end]).logits[0]
            assert (together[start:end] - alone).abs().max() <= 1e-5


def test_a_row_that_would_be_cut_is_refused(make_trainer):
    made, _ = make_trainer(False, "eager")
    longest = max(map(len, made.train_dataset["input_ids"]))
    assert len(trainer.packed(made.train_dataset, longest)) >= 1
    with pytest.raises(DataError, match=f"longer than max_length = {longest - 1} tokens"):
        trainer.packed(made.train_dataset, longest - 1)


def test_the_engine_trains_on_packs_as_on_rows(tmp_path, make_job, rows):
    """Three steps over all rows, in packs and one by one: the same weights, to rounding, and the same validation loss."""
    outcomes, losses, records = [], [], []
    for name, settings in (("packs", {"packing": True}), ("rows", {"group_by_length": False})):
        folder = tmp_path / name
        settings |= {
            "max_length": MAX_LENGTH,
            "optim": "sgd",
            "learning_rate": 1e-2,
            "warmup_ratio": 0.0,
            "per_device_train_batch_size": 64,
        }
        job = make_job(folder, rows, rows[:10], num_epochs=3, per_device_eval_batch_size=10, **settings)
        result = train.run(job, folder / "run", "test")
        outcomes.append(load_to_train(result.checkpoint)[0])
        losses.append(result.metrics["validation_loss"])
        records.append(store.read_json(Path(result.checkpoint) / RUN_RECORD))
    pairs = zip(outcomes[0].parameters(), outcomes[1].parameters(), strict=True)
    assert max((left - right).abs().max().item() for left, right in pairs) < 1e-5
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) == 3
    assert [record["metrics"]["rows"] for record in records] == [len(rows), len(rows)]
    assert records[0]["job"]["lab"] == {"packing": True}
    assert f"packing: {len(rows)} rows in " in (tmp_path / "packs" / "run" / "train.log").read_text()


def test_the_packs_of_a_batch_count_together_when_attention_is_chosen():
    lab = {"packing": True, "lora_rank": 0}
    training = {"max_length": 256, "per_device_train_batch_size": 4}
    assert train._choose(training, lab, [])["attention"]["value"] == "sdpa"
    assert train._choose(training, {**lab, "packing": False}, [])["attention"]["value"] == "eager"
