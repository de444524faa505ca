"""Forward passes: against a plain loop in float64, whatever the batch; kept, so that nothing is read twice."""

import math
import shutil

import pytest

from distill import probing, store
from distill.errors import BackendError, ConfigError, PreflightError
from distill.prompt import trained_ids

ROWS = [
    {"instruction": "What is 3 + 4?", "mode": "system1", "text": "7"},
    {"instruction": "What is 347 + 285?", "mode": "system2", "text": "<think>\n7 + 5 = 12, write 2, carry 1\n</think>\n\n632"},
    {"instruction": "Reverse the word.", "input": "abc", "mode": "system1", "text": "cba, and here a few words more than it takes"},
    {"instruction": "Say nothing wrong.", "mode": "system2", "text": "<think>\nnever ends <|im_end|> <b>"},
]

# end of turn included; 632 is three tokens and an end
FINAL_TOKENS = {"What is 3 + 4?": 2, "What is 347 + 285?": 4, "Reverse the word.": 0, "Say nothing wrong.": 0}  # 0: all of them


@pytest.fixture(scope="module")
def loaded(micro):
    from distill.models import load_to_answer

    return load_to_answer(str(micro / "teacher"), "teacher", 32)


def plain(model, tokenizer, row: dict) -> dict:
    """An entry, one token at a time, in float64."""
    import torch

    ids, mask = trained_ids(tokenizer, row["instruction"], row["text"], row.get("input", ""), row["mode"])
    with torch.inference_mode():
        rows = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    places = [place for place, one in enumerate(mask) if one]
    logs = [rows[place - 1, ids[place]].item() for place in places]
    top1 = [rows[place - 1].argmax().item() for place in places]
    behind = places[-FINAL_TOKENS[row["instruction"]] :]
    return {
        "tokens": len(places),
        "nll": -sum(logs),
        "top1": top1,
        "final_probability": math.exp(sum(rows[place - 1, ids[place]].item() for place in behind)),
        "token_confidence": sum(rows[place - 1].max().exp().item() for place in places) / len(places),
        "token_right": sum(ids[place] == best for place, best in zip(places, top1, strict=True)) / len(places),
    }


def same(found: dict, wanted: dict) -> bool:
    exact = all(found[key] == wanted[key] for key in ("tokens", "top1", "token_right"))
    return exact and all(found[key] == pytest.approx(wanted[key], rel=1e-4) for key in ("nll", "final_probability", "token_confidence"))


def read(loaded, rows: list[dict], **settings) -> list[dict]:
    entries = {}
    for batch in probing.read_rows(*loaded, rows, **settings):
        entries |= batch
    return [entries[number] for number in range(len(rows))]


def test_an_entry_agrees_with_a_plain_loop_in_float64(loaded):
    for found, row in zip(read(loaded, ROWS), ROWS, strict=True):
        assert same(found, plain(*loaded, row)), row


def test_neither_padding_nor_the_size_of_a_tile_changes_an_entry(loaded, monkeypatch):
    together = read(loaded, ROWS)
    assert all(map(same, read(loaded, ROWS, batch_tokens=1), together))
    monkeypatch.setattr(probing, "TILE_LOGITS", 5 * 573)
    assert all(map(same, read(loaded, ROWS), together))


def test_logits_are_made_at_supervised_positions_alone_and_by_tiles(loaded, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(probing, "TILE_LOGITS", 5 * 573)
    rows = []
    handle = model.get_output_embeddings().register_forward_hook(lambda module, given, made: rows.append(made.shape[0]))
    try:
        entries = read(loaded, ROWS)
    finally:
        handle.remove()
    assert max(rows[2:]) == 5, "the first two are the check of the head"
    assert sum(rows[2:]) == sum(entry["tokens"] for entry in entries)


def final(tokenizer, row: dict) -> str:
    """The final answer of a row, as its tokens say."""
    ids, mask = trained_ids(tokenizer, row["instruction"], row["text"], mode=row["mode"])
    return tokenizer.decode(ids[len(ids) - sum(mask) + probing._final_from(tokenizer, row) :])


def test_the_final_answer_is_what_stands_behind_the_thought_with_its_end_of_turn(loaded, micro):
    from distill.models import load_tokenizer

    reasoning = load_tokenizer(str(micro / "teacher"))
    reasoning.add_tokens(["<think>", "</think>"])  # as a reasoning model's has them; to another they are letters
    assert final(loaded[1], ROWS[1]) == "632<|im_end|>" and final(reasoning, ROWS[1]) == "\n\n632<|im_end|>"
    assert final(loaded[1], ROWS[0]) == "7<|im_end|>", "without a thought, all of it"
    assert final(reasoning, {**ROWS[1], "text": "<think>\n1\n</think>"}) == "<|im_end|>", "a thought and no answer"


def test_a_template_that_opens_the_thought_leaves_its_closing_out_of_the_final_answer(micro):
    from distill.models import load_tokenizer

    tokenizer = load_tokenizer(str(micro / "teacher"))
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    assert final(tokenizer, {**ROWS[0], "mode": "system2"}) == "7<|im_end|>"


def test_a_row_beyond_the_positions_is_left_out_and_the_others_are_read(loaded):
    model, _ = loaded
    long = {**ROWS[0], "text": "7 " * model.config.max_position_embeddings}
    first, second = read(loaded, [long, ROWS[0]])
    assert first == {"skipped": "longer than the model's 1,024 positions"}
    assert same(second, plain(*loaded, ROWS[0]))


def test_a_model_that_changes_its_logits_behind_the_head_is_refused(tokenizer):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    capped = AutoConfig.for_model("gemma2", **sizes, head_dim=16, vocab_size=573, final_logit_softcapping=0.1, pad_token_id=0)
    with pytest.raises(ConfigError, match="changes its logits behind the output head"):
        next(probing.read_rows(AutoModelForCausalLM.from_config(capped), tokenizer, ROWS))


# In a subprocess


def request(micro, rows: list[dict], **settings) -> dict:
    return {"name": "teacher", "path": str(micro / "teacher"), "role": "teacher", "bits": 32, "rows": rows, **settings}


@pytest.fixture
def started(monkeypatch) -> list:
    """The modules that were started in a process of their own."""
    modules, run = [], probing.engine.run_module
    monkeypatch.setattr(probing.engine, "run_module", lambda module, *rest: modules.append(module) or run(module, *rest))
    return modules


def test_what_was_read_is_not_read_again_and_no_model_is_loaded(project, micro, loaded, started, capsys):
    rows = [*ROWS, {**ROWS[0], "text": " \n"}, {**ROWS[0], "text": "half \ud800"}, ROWS[0]]
    student = {**request(micro, rows[:2]), "name": "student", "role": "student", "path": str(micro / "student_system1")}
    first = probing.probe_all([request(micro, rows), student], project / "run")
    assert all(same(found, plain(*loaded, row)) for found, row in zip(first["teacher"], ROWS, strict=False))
    assert first["teacher"][4:6] == [None, None] and first["teacher"][6] == first["teacher"][0]
    assert "1 of 7 answers cannot be read: no text" in (said := capsys.readouterr().out) and "no valid Unicode" in said
    assert [entry["top1"] for entry in first["student"]] != [entry["top1"] for entry in first["teacher"][:2]]
    assert probing.probe_all([request(micro, rows), student], project / "run") == first
    assert started == ["distill.probing"], "once"
    journals = list((project / "runs" / "probes").iterdir())
    assert len(journals) == 2 and sum(len(store.read_journal(journal)) for journal in journals) == 4 + 1 + 2


def test_a_student_whose_weights_are_not_finite_is_read_by_no_row_and_ends_nothing(project, micro, monkeypatch, capsys):
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(micro / "student_system1", project / "broken")
    weights = load_file(project / "broken" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"].fill_(torch.nan)
    save_file(weights, project / "broken" / "model.safetensors", metadata={"format": "pt"})
    broken = {**request(micro, ROWS), "name": "student", "role": "student", "path": str(project / "broken")}
    monkeypatch.setattr(
        probing, "_read", lambda requests, *rest: [probing._read_one(each, 0) for each in requests]
    )  # no process of its own
    found = probing.probe_all([broken, request(micro, ROWS[:1])], project / "run")
    assert found["student"] == [None] * 4 and found["teacher"][0]["tokens"] == 2
    assert "student: 4 of 4 answers cannot be read: its weights give numbers that are not finite" in capsys.readouterr().out


@pytest.mark.parametrize(("logarithms", "best"), [([-1.0, math.nan], [-1.0, -1.0]), ([-math.inf], [-0.5])])
def test_a_single_number_that_is_not_finite_makes_no_entry(logarithms, best):
    entry = probing._entry(logarithms, best, [1] * len(best), [True] * len(best), 0)
    assert entry == {"skipped": "its weights give numbers that are not finite"}


def test_a_journal_that_broke_off_is_gone_on_with(project, micro, monkeypatch):
    one = probing._Kept(request(micro, ROWS[:2]))
    store.make_folder(one.journal.parent)
    store.add_to_journal(one.journal, {"id": store.MODEL, "bits": 32})
    store.add_to_journal(one.journal, {"id": one.names[0], "tokens": 2})
    with open(one.journal, "ab") as file:
        file.write(b'{"id": "cut sho')

    def answer(requests, *rest):
        for row in requests[0]["rows"]:
            store.add_to_journal(requests[0]["journal"], {"id": row["id"], "tokens": 9})

    monkeypatch.setattr(probing, "_read", answer)
    assert probing.probe_all([request(micro, ROWS[:2])], project / "run")["teacher"] == [{"tokens": 2}, {"tokens": 9}]
    assert probing.probe_all([request(micro, ROWS[:2])], project / "run", fresh=True)["teacher"] == [{"tokens": 9}] * 2


def test_a_teacher_that_does_not_fit_is_refused_before_it_is_loaded(project, micro, memory, started):
    memory(0.001)
    with pytest.raises(PreflightError, match="The teacher does not fit"):
        probing.probe_all([request(micro, ROWS)], project / "run")
    assert started == []


def test_a_model_that_cannot_be_read_is_named(project, micro):
    broken = {**request(micro, ROWS), "name": "student", "role": "student", "bits": 7}
    with pytest.raises(BackendError, match=r"(?s)^Reading \(student\) failed: .*ConfigError: bits = 7"):
        probing.probe_all([broken], project / "run")
