"""The micro world, made by a command: a teacher that is really good at its tasks, two untrained students, and data that the teacher wrote.

`build_micro` trains the teacher with the lab's own engine on exact answers, proves it on held-out questions, then lets it write the two
data files in the schemas of DistilQwen and OmniThought: answers are sampled from it, right or wrong.
"""

import random
import shutil
from pathlib import Path

from . import checkpoint, store, train
from .answers import answer_all
from .console import progress, say, table
from .data import write_tokenized
from .errors import BackendError, ConfigError
from .metrics import final_answer
from .microtasks import FAMILIES, build_tokenizer, difficulty_level, phrase, sample_questions, sample_thought, verbosity_level
from .models import device, load_to_train
from .scores import exact_match

MICRO = store.ROOT / "data" / "micro"
TEACHER_NAME = "micro-teacher"
SYSTEM1_FAMILIES = [name for name, family in FAMILIES.items() if family.system == 1]
SYSTEM2_FAMILIES = [name for name, family in FAMILIES.items() if family.system == 2]
MAX_NEW_TOKENS = {"system1": 12, "system2": 300}
HELDOUT_PER_FAMILY = 200
TEACHER_FLOOR = 0.97  # exact match on every family, or the teacher is not shipped
_STUDENT = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.08,  # Qwen's is 0.02, at which models this small learn late
}
SHAPES = {
    "teacher": {
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "intermediate_size": 512,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "initializer_range": 0.06,
    },
    "student_system1": _STUDENT,
    "student_system2": _STUDENT,
}
TEACHER_TRAINING = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "max_length": 512,
    "learning_rate": 1.5e-3,
    "weight_decay": 0.01,
    "adam_beta2": 0.99,
    "warmup_ratio": 0.05,
    "lr_scheduler_type": "cosine",
    "group_by_length": True,
    "logging_steps": 20,
    "save_strategy": "epoch",
    "save_total_limit": 1,
}
# questions a family: what the teacher learns from, and what it writes afterwards
TEACHER_ROWS = {"system1": 2000, "system2": 5000}
WRITTEN_QUESTIONS = {"system1": 1200, "system2": 1500}
TRACES_A_QUESTION = 3
TEMPERATURE = {"system1": 1.0, "system2": 1.0}
TEACHER_SEED, WRITTEN_SEED = 1, 2


def build_micro(out: str | Path = "data/micro", seed: int = 0) -> dict:
    """Make the micro world and publish it whole at `out`.

    Returns {"teacher": {family: exact match with interval}, "rows": {file: rows}}.
    Raises BackendError where the teacher stays below TEACHER_FLOOR on a family; then nothing is published.
    """
    out = store.resolve(out)
    if store.is_dir(out) and any(out.iterdir()) and store.read_manifest(out) is None:
        raise ConfigError(f"{store.shown(out)} holds something that is no micro world. Name another folder.")
    work = store.ROOT / "runs" / "build-micro"
    work.mkdir(parents=True, exist_ok=True)
    with store.lock(out), store.atomic_folder(out) as folder:
        tokenizer = build_tokenizer()
        for name in SHAPES:
            _save(new_model(name, tokenizer, seed), tokenizer, folder / name)
        _train_teacher(folder / "teacher", work, seed)
        store.write_jsonl(folder / "heldout.jsonl", heldout_questions())
        model, tokenizer = load_to_train(str(folder / "teacher"))
        model.to(device()[0]).eval()
        scores = prove_teacher(model, tokenizer, list(store.read_rows(folder / "heldout.jsonl")))
        omnithought = _omnithought_rows(model, tokenizer, seed)
        rows = {"distilqwen.parquet": _distilqwen_rows(model, tokenizer, seed, omnithought), "omnithought.parquet": omnithought}
        for name, table_rows in rows.items():
            store.write_parquet(folder / name, table_rows)
        facts = {"seed": seed, "teacher": scores, "rows": {name: len(table_rows) for name, table_rows in rows.items()}}
        store.write_manifest(folder, facts)
    return {key: facts[key] for key in ("teacher", "rows")}


def new_model(name: str, tokenizer, seed: int):
    """An untrained Qwen2 model of one of SHAPES, reproducible by `seed`."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **SHAPES[name],
        )
    )


def _save(model, tokenizer, folder: Path) -> None:
    """Save a model in bf16, as Qwen's own are."""
    import torch

    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def system2_output(thought: str, solution: str) -> str:
    """OmniThought's `full_response`, to the letter."""
    return f"<think>\n{thought}\n</think>\n\n{solution}"


def gold_rows(seed: int) -> dict[str, list[dict]]:
    """The teacher's lessons by mode: exact answers, and worked steps for the reasoning families."""
    rng = random.Random(f"lessons {seed}")
    rows: dict[str, list[dict]] = {"system1": [], "system2": []}
    for name, family in FAMILIES.items():
        mode = f"system{family.system}"
        for question in sample_questions(name, TEACHER_ROWS[mode], TEACHER_SEED + seed, "train"):
            output = question.answer if mode == "system1" else system2_output(sample_thought(question, rng), question.answer)
            rows[mode].append({"id": question.id, "instruction": phrase(question, rng), "input": "", "output": output})
    return rows


def _train_teacher(folder: Path, work: Path, seed: int) -> None:
    """Train the teacher in place, by an ordinary job of the built-in engine; one that `work` holds already is taken from there."""
    untrained, tokenizer = load_to_train(str(folder))
    tokens, trained = work / "train_tokenized.json", work / "trained"
    _write_lessons(tokens, tokenizer, seed)
    job = {
        "job_type": "kd_black_box_train_only",
        "dataset": {"labeled_path": str(tokens)},
        "models": {"student": str(work / "untrained")},
        "training": {**TEACHER_TRAINING, "output_dir": str(trained), "seed": seed},
    }
    record = store.read_manifest(trained, name=checkpoint.RUN_RECORD) if trained.is_dir() else None
    known = record and (record["job"], record["tokens_sha256"], record["student_sha256"], record["engine_sha256"])
    if known == (job, store.hash_file(tokens), store.hash_json(checkpoint.weight_hashes(untrained)), checkpoint.engine_sha256()):
        say(f"teacher: trained before, in {store.shown(trained)}")
    else:
        _copy_model(folder, work / "untrained")
        result = train.run(store.write_json(work / "job.json", job), work, "the micro teacher")
        say(f"teacher: trained in {result.seconds:.0f} s, {result.metrics['parameters']:,} parameters")
    model, tokenizer = load_to_train(str(trained))
    _save(model, tokenizer, folder)


def _write_lessons(tokens: Path, tokenizer, seed: int) -> None:
    """The teacher's lessons of both modes as one token file."""
    parts = []
    for mode, rows in gold_rows(seed).items():
        labeled = tokens.with_name(f"{mode}.json")
        store.write_rows(labeled, rows)
        part = tokens.with_name(f"{mode}_tokenized.json")
        parts.append(write_tokenized(labeled, tokenizer, TEACHER_TRAINING["max_length"], mode, part).path)
    store.write_rows(tokens, (row for part in parts for row in store.read_rows(part)))


def _copy_model(folder: Path, place: Path) -> None:
    with store.atomic_folder(place) as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)


def heldout_questions() -> list[dict]:
    """HELDOUT_PER_FAMILY questions of each family that no training row asks, in any phrasing."""
    rng = random.Random("heldout")
    return [
        {"id": question.id, "family": name, "system": family.system, "instruction": phrase(question, rng), "answer": question.answer}
        for name, family in FAMILIES.items()
        for question in sample_questions(name, HELDOUT_PER_FAMILY, 0, "heldout")
    ]


def prove_teacher(model, tokenizer, questions: list[dict]) -> dict:
    """The teacher's exact match by family, each asked as its system says. Raises BackendError below TEACHER_FLOOR."""
    texts = [answer["text"] for answer in _answers(model, tokenizer, questions, temperature=0.0, seed=0)]
    scores = exact_match(questions, texts)
    table("Teacher", ["family", "exact match"], [[family, f"{score['value']:.3f}"] for family, score in scores.items()])
    weak = [family for family, score in scores.items() if score["value"] < TEACHER_FLOOR]
    if weak:
        raise BackendError(f"The teacher stays below {TEACHER_FLOOR} on {', '.join(weak)}: train it longer or on more rows.")
    return scores


def _answers(model, tokenizer, questions: list[dict], temperature: float, seed: int) -> list:
    """Answers in the order of the questions, each asked in its system's mode."""
    done = 0
    with progress("Asking the teacher", total=len(questions)) as update:

        def finished(answers: dict) -> None:
            nonlocal done
            done += len(answers)
            update(done)

        asked = [{"instruction": question["instruction"], "mode": f"system{question['system']}"} for question in questions]
        request = {"questions": asked, "max_new_tokens": MAX_NEW_TOKENS, "temperature": temperature, "seed": seed, "batch_tokens": 65_536}
        return answer_all(model, tokenizer, request, finished)["answers"]


def _written_questions(system: int, seed: int) -> list[dict]:
    """The questions that the teacher writes rows for: others than its lessons, each in one phrasing."""
    rng = random.Random(f"written {system} {seed}")
    return [
        {"question": question, "system": system, "instruction": phrase(question, rng)}
        for name, family in FAMILIES.items()
        if family.system == system
        for question in sample_questions(name, WRITTEN_QUESTIONS[f"system{system}"], WRITTEN_SEED + seed, "train")
    ]


def _distilqwen_rows(model, tokenizer, seed: int, traces: list[dict]) -> list[dict]:
    """DistilQwen's schema: {"instruction", "output"}. Reasoning questions stand with the teacher's bare final answer."""
    asked = _written_questions(1, seed)
    answers = _answers(model, tokenizer, asked, TEMPERATURE["system1"], seed)
    rows = [
        {"instruction": question["instruction"], "output": answer["text"].strip()}
        for question, answer in zip(asked, answers, strict=True)
        if answer["stopped"] and answer["text"].strip()
    ]
    rows += [{"instruction": row["question"], "output": row["reasoning"][0]["solution"]} for row in traces]
    random.Random(seed).shuffle(rows)
    return rows


def _omnithought_rows(model, tokenizer, seed: int) -> list[dict]:
    """OmniThought's schema: a question and several traces, right or wrong, short or long, each with its levels."""
    asked = _written_questions(2, seed)
    several = [question for question in asked for _ in range(TRACES_A_QUESTION)]
    answers = _answers(model, tokenizer, several, TEMPERATURE["system2"], seed)
    rows = []
    for number, question in enumerate(asked):
        written = answers[number * TRACES_A_QUESTION : (number + 1) * TRACES_A_QUESTION]
        traces = [trace for trace in (_trace(question["question"], answer) for answer in written) if trace]
        if len(traces) > 1:  # every real row has at least two
            rows.append({"question": question["instruction"], "reasoning": traces})
    random.Random(seed).shuffle(rows)
    return rows


def _trace(question, answer: dict) -> dict | None:
    """One trace in OmniThought's form; None for an answer that was cut off or has another form."""
    thought, closed, solution = answer["text"].removeprefix("<think>\n").partition("\n</think>\n\n")
    if not (answer["stopped"] and closed and solution.strip() and answer["text"] == system2_output(thought, solution)):
        return None
    judge = "micro-rules"
    return {
        "Cognitive_Difficulty": {"judge": judge, "level": difficulty_level(question)},
        "Reasoning_Verbosity": {"judge": judge, "level": verbosity_level(thought, question)},
        "full_response": answer["text"],
        "solution": solution,
        "teacher": TEACHER_NAME,
        "thought": thought,
        "thought_correctness_verify": final_answer(answer["text"]) == question.answer,
    }
