"""A made-up evaluation of the micro world's size and figures, for what shows one: both systems, or with parts taken away or made hostile.

The figures follow benchmarks/RESULTS.md (seed 0) where they stand there; the rest is invented, and drawn with a seed.
"""

import math
import random

HOSTILE = [
    "<script>alert(1)</script><img src=x onerror=alert(2)></div></td></table></style></details>",
    "A" * 100_000,
    "مرحبا بالعالم \u202egnp.exe\u202c — שלום",
    "\x00\x1b[31mred\x1b[0m \x07 \x9b2J \u2028 next",
    "```\n# no heading\n| no | table |\n````\n<!-- no comment -->",
    "a | b \\ c `d` **e** [f](javascript:alert(1)) $x$ &amp; {{7*7}}",
]

_TITLES = {
    "teacher": ("teacher", "Teacher", None, "data/micro/teacher", 1_685_888, 1_799_040, 3_400_112, 8),
    "before_system1": ("before", "System-1 student before", "system1", "data/micro/student_system1", 657_024, 2_628_096, 2_640_000, 32),
    "system1": ("after", "System-1 student", "system1", "distilled-micro-system1", 657_024, 2_628_096, 2_641_304, 32),
    "before_system2": ("before", "System-2 student before", "system2", "data/micro/student_system2", 657_024, 2_628_096, 2_640_000, 32),
    "system2": ("after", "System-2 student", "system2", "distilled-micro-cot", 657_024, 2_628_096, 2_641_304, 32),
}
_FAMILIES = {
    "system1": {"reverse": 1.0, "swap": 1.0, "last_letter": 1.0, "largest": 0.985, "smallest": 0.995, "parity": 1.0, "count_even": 0.92},
    "system2": {"add": 0.99, "subtract": 0.975, "multiply": 0.93},
}


def evaluation(each: int = 20) -> dict:
    """Both systems, with `each` questions a family, every measure taken, nothing wrong with the students."""
    draw = random.Random(0)
    cases = {mode: _cases(mode, each, draw) for mode in _FAMILIES}
    return {
        "schema": 1,
        "made": "2026-11-22T09:30:00+0000",
        "command": "python distill_app.py evaluate distilled-micro-system1 distilled-micro-cot --teacher data/micro/teacher --seed 0",
        "seed": 0,
        "title": "micro-teacher → distilled-micro-system1, distilled-micro-cot",
        "device": {"name": "CPU, 2 cores", "kind": "cpu", "threads": 2},
        "versions": {"python": "3.11.7", "torch": "2.13.0+cpu", "transformers": "5.23.0", "sacrebleu": "2.6.0", "rouge-score": "0.1.2"},
        "models": {name: _model(name, cases) for name in _TITLES},
        "systems": {mode: _system(mode, cases[mode], each) for mode in cases},
        "speed": _speed(),
        "speed_skipped": None,
        "targets": _targets(cases),
        "benchmarks": _benchmarks(),
        "judge": {},
        "ratings": {},
        "out": "reports/evaluation",
        "extras": [_controls()],
    }


def one_system() -> dict:
    """System 2 alone, the other's model, targets and timings gone."""
    facts = evaluation()
    del facts["systems"]["system1"]
    facts["models"] = {name: model for name, model in facts["models"].items() if model["system"] != "system1"}
    facts["targets"] = [target for target in facts["targets"] if target["system"] == "system2"]
    del facts["speed"]["models"]["system1"]
    facts["speed"]["ratios"] = [ratio for ratio in facts["speed"]["ratios"] if ratio["student"] == "system2"]
    facts["title"] = "micro-teacher → distilled-micro-cot"
    return facts


def without_speed() -> dict:
    """Nothing was timed: a run with speed skipped."""
    facts = evaluation()
    facts.update(speed=None, speed_skipped="not asked for (--no-speed)", benchmarks={}, extras=[])
    for target in facts["targets"]:
        if "quality" not in target["name"] and "reason" not in target["name"].lower():
            target.update(value=None, shown="", ci=None, met=None, note="not timed")
    return facts


def unmeasured() -> dict:
    """Whatever may be None is None."""
    facts = without_speed()
    for model in facts["models"].values():
        model["disk_bytes"] = None
        for quality in model["quality"].values():
            quality.update({key: _value(None, 0, None) for key in ("perplexity", "rouge_l", "bleu", "token_f1")})
            quality.update(math_verified=None, agreement=None, calibration=None, families={})
    for target in facts["targets"]:
        target.update(value=None, shown="", ci=None, met=None)
    for system in facts["systems"].values():
        leakage = {"checked_against": None, "removed": 0, "same": 0, "n_grams": 0, "examples": [], "why_unchecked": "no run record there"}
        system["questions"]["leakage"] = leakage
        system.update(training=None, retained={key: _value(None, 200, None) for key in system["retained"]})
    return facts


def broken() -> dict:
    """A System-2 student that never stops, repeats itself and is right nowhere."""
    facts = evaluation()
    quality = facts["models"]["system2"]["quality"]["system2"]
    n = quality["n"]
    quality.update(
        exact_match=_share(0, n), stopped=_share(0, n), repeating=_share(n, n), reasoned=_share(0, n), tokens=_value(256.0, n, 0.0)
    )
    quality["families"] = {family: _share(0, value["n"]) for family, value in quality["families"].items()}
    system = facts["systems"]["system2"]
    for case in system["cases"]:
        case["answers"]["system2"] = {"text": "6 6 6 6 " * 60, "right": False, "tokens": 256, "stopped": False, "score": 0.0}
    system["retained"]["exact_match"] = _value(0.0, n, 0.0)
    for target in facts["targets"]:
        if target["system"] == "system2" and target["shown"].endswith("%"):
            target.update(value=0.0, shown="0.0%", ci=[0.0, 0.06], met=False)
    system["diagnosis"] = [
        {
            "what": "The answers do not stop by themselves",
            "evidence": f"0 of {n} answers ended before their limit of 256 tokens (0.0%, at most 6.0%).",
            "advice": "Train on the end of the turn: check that rows are not cut at max_length, and that eos_token_id is set.",
        },
        {
            "what": "The answers repeat themselves",
            "evidence": f"{n} of {n} answers consist for more than half of 4-grams that stood before.",
            "advice": "Look at the training rows; lower the learning rate, or train for fewer epochs.",
        },
    ]
    return facts


def hostile() -> dict:
    """Texts and names that would act on a page, a terminal or a Markdown renderer."""
    facts = evaluation()
    for system in facts["systems"].values():
        for number, (case, text) in enumerate(zip(system["cases"], HOSTILE, strict=False)):
            case["instruction"] = case["reference"] = text
            for answer in case["answers"].values():
                answer["text"] = f"<think>\n{text}\n</think>\n{text}" if number % 2 else text
        system["questions"]["leakage"]["examples"] = [
            {"id": text[:60], "instruction": text, "training": text, "how": "same"} for text in HOSTILE
        ]
        system["questions"]["source"] = system["headline_reason"] = HOSTILE[0]
        system["training"]["settings"][HOSTILE[0]] = {"value": HOSTILE[5], "origin": HOSTILE[2]}
        system["diagnosis"] = [{"what": HOSTILE[0], "evidence": HOSTILE[1][:300], "advice": HOSTILE[5]}]
    facts["title"], facts["command"] = HOSTILE[0], HOSTILE[4]
    facts["models"]["system1"]["path"] = HOSTILE[0]
    facts["extras"][0]["rows"][0] = [HOSTILE[5]] * len(facts["extras"][0]["columns"])
    return facts


VARIANTS = {
    "both": evaluation,
    "one_system": one_system,
    "without_speed": without_speed,
    "unmeasured": unmeasured,
    "broken": broken,
    "hostile": hostile,
}


def _value(value, n: int, half) -> dict:
    return {"value": value, "n": n, "ci": None if half is None else [value - half, value + half]}


def _share(right: int, n: int) -> dict:
    """A proportion with its Wilson interval."""
    share, z = right / n, 1.96**2 / n
    half = 1.96 * math.sqrt(share * (1 - share) / n + z / (4 * n)) / (1 + z)
    middle = (share + z / 2) / (1 + z)
    return {"value": share, "n": n, "ci": [max(0.0, middle - half), min(1.0, middle + half)]}


# Cases


def _cases(mode: str, each: int, draw: random.Random) -> list[dict]:
    """Held-out questions with three answers each, those on which the models differ most first."""
    cases = [_case(mode, family, right, draw) for family, right in _FAMILIES[mode].items() for _ in range(each)]
    return sorted(cases, key=lambda case: case["answers"][mode]["right"])


def _case(mode: str, family: str, right: float, draw: random.Random) -> dict:
    left, second = draw.randint(100, 999), draw.randint(100, 399)
    if mode == "system2":
        signs = {"add": ("+", left + second), "subtract": ("-", left - second), "multiply": ("*", left * (second % 9 + 1))}
        sign, answer = signs[family]
        second = second % 9 + 1 if family == "multiply" else second
        question, wrong = f"What is {left} {sign} {second}?", answer + 10
    else:
        question, answer, wrong = f"Give only the {family.replace('_', ' ')} of {left}{second}.", left % 10, (left + 1) % 10
    good = draw.random() < right
    answers = {
        "teacher": _answer(mode, question, answer, True, draw),
        f"before_{mode}": {"text": "7 7 ? ? swap 7 7", "right": False, "tokens": 256, "stopped": False, "score": 0.0},
        mode: _answer(mode, question, answer if good else wrong, good, draw),
    }
    reference = str(answer)
    known = {"id": f"{family}:{left},{second}", "family": family, "instruction": question, "input": ""}
    return known | {"reference": reference, "answers": answers}


def _answer(mode: str, question: str, answer: int, right: bool, draw: random.Random) -> dict:
    text = str(answer)
    if mode == "system2":
        steps = "\n".join(f"step {step}: write down {draw.randint(0, 9)}, carry {draw.randint(0, 1)}" for step in range(draw.randint(2, 7)))
        text = f"<think>\n{question}\n{steps}\nput together: {answer}\n</think>\n{answer}"
    return {"text": text, "right": right, "tokens": max(2, len(text) // 2), "stopped": True, "score": float(right)}


# Models and their quality


def _model(name: str, cases: dict) -> dict:
    role, title, system, path, parameters, weight_bytes, disk_bytes, bits = _TITLES[name]
    modes = [system] if system else list(cases)
    quality = {mode: _quality(name, role, mode, cases[mode]) for mode in modes}
    known = {"name": name, "role": role, "title": title, "system": system, "path": path, "parameters": parameters}
    return known | {
        "weight_bytes": weight_bytes,
        "same_tokens": True,
        "fingerprint": "0" * 64,
        "disk_bytes": disk_bytes,
        "bits": bits,
        "quality": quality,
    }


def _quality(name: str, role: str, mode: str, cases: list[dict]) -> dict:
    answers = [case["answers"][name] for case in cases]
    n, right = len(cases), sum(answer["right"] for answer in answers)
    share = right / n
    tokens = sum(answer["tokens"] for answer in answers) / n
    untrained = role == "before"
    families = dict.fromkeys(case["family"] for case in cases)
    for family in families:
        those = [case["answers"][name]["right"] for case in cases if case["family"] == family]
        families[family] = _share(sum(those), len(those))
    return {
        "n": n,
        "exact_match": _share(right, n),
        "token_f1": _value(share, n, 0.012),
        "rouge_l": _value(share * 0.99, n, 0.011),
        "bleu": _value(100 * share * 0.98, n, 1.6),
        "math_verified": _share(right, n) if mode == "system2" else None,
        "perplexity": _value(712.4, n, 9.1) if untrained else _value(1.04 if role == "teacher" else 1.07, n, 0.012),
        "reasoned": _share(n if mode == "system2" and not untrained else 0, n),
        "stopped": _share(0 if untrained else n, n),
        "repeating": _share(n if untrained else 0, n),
        "empty": _share(0, n),
        "tokens": _value(tokens, n, 1.4),
        "agreement": None if role == "teacher" else _value(0.02 if untrained else 0.987, n, 0.004),
        "calibration": _calibration(role, share, n),
        "families": families,
    }


def _calibration(role: str, share: float, n: int) -> dict:
    if role == "before":
        bins = [{"low": 0.0, "high": 0.1, "n": n, "confidence": 0.02, "accuracy": 0.0}]
        return {"ece": 0.02, "n": n, "ci": [0.018, 0.022], "bins": bins}
    sizes = {0.35: 0.04, 0.55: 0.06, 0.75: 0.1, 0.85: 0.2, 0.98: 0.6}
    slack = 0.05 if role == "teacher" else -0.08
    bins = [
        {
            "low": math.floor(10 * middle) / 10,
            "high": math.floor(10 * middle) / 10 + 0.1,
            "n": round(part * n),
            "confidence": middle,
            "accuracy": min(1.0, max(0.0, middle + slack * (1 - middle) * 3)),
        }
        for middle, part in sizes.items()
    ]
    return {"ece": abs(slack) / 2, "n": n, "ci": [abs(slack) / 3, abs(slack)], "bins": bins}


# Systems


def _system(mode: str, cases: list[dict], each: int) -> dict:
    n = len(cases)
    right = sum(case["answers"][mode]["right"] for case in cases)
    share = right / n
    keys = ("exact_match", "token_f1", "rouge_l", "bleu")
    lost = {"value": share - 1, "n": n, "ci": [share - 1 - 0.011, share - 1 + 0.012], "p": 0.031}
    gained = {"value": share, "n": n, "ci": [share - 0.02, share + 0.01], "p": 0.0002}
    return {
        "mode": mode,
        "student": mode,
        "before": f"before_{mode}",
        "teacher": "teacher",
        "headline": "exact_match",
        "references_read": "the reference answers",
        "headline_reason": "every reference is one short answer that can be matched exactly",
        "questions": {
            "source": "data/micro/heldout.jsonl",
            "sha256": "4f1d0c9be2a74d5c8c1b6d0b3a96a2f7f0c1e5a1b7c3d9e8f2a4b6c8d0e1f203",
            "rows": n,
            "read": 2_000,
            "leakage": {
                "checked_against": 9_405 if mode == "system1" else 4_263,
                "removed": 3,
                "same": 2,
                "n_grams": 1,
                "examples": [
                    {
                        "id": "reverse:TNIG",
                        "instruction": "Write backwards the letters TNIG.",
                        "training": "write backwards, the letters tnig",
                        "how": "same",
                    }
                ],
                "why_unchecked": None,
            },
            "note": f"{each} questions a family, the first of each in the file's order",
        },
        "retained": {key: {"value": share, "n": n, "ci": [share - 0.012, min(1.0, share + 0.011)]} for key in keys},
        "against_teacher": dict.fromkeys(keys[:3], lost),
        "against_before": {
            key: gained | ({"mcnemar": {"gained": right, "lost": 0, "p": 2.0 ** (1 - right)}} if key == "exact_match" else {})
            for key in keys
        },
        "training": _training(mode),
        "cases": cases,
        "diagnosis": [],
    }


def _training(mode: str) -> dict:
    steps, end, seconds, rows = (2_352, 0.041, 85.2, 9_405) if mode == "system1" else (1_335, 0.029, 137.4, 4_263)
    draw = random.Random(mode)
    training = [[step, (6.3 - end) * math.exp(-step / 120) + end * draw.uniform(0.8, 1.25)] for step in range(10, steps, 20)]
    epochs = 4 if mode == "system1" else 5
    validation = [[round(steps * epoch / epochs), end * 1.1 + 0.25 * 0.3**epoch] for epoch in range(1, epochs + 1)]
    preset = f"preset micro_{mode}"
    return {
        "rows": rows,
        "validation_rows": 495 if mode == "system1" else 224,
        "epochs": epochs,
        "steps": steps,
        "seconds": seconds,
        "backend": "builtin",
        "labels_by": "the micro teacher, 8-bit (1,000 rows relabelled), and the data set's own labels"
        if mode == "system1"
        else "the data set",
        "loss": {"training": training, "validation": validation},
        "loss_reduction": {"training": _reduction(training), "validation": _reduction(validation)},
        "settings": {
            "num_train_epochs": {"value": epochs, "origin": preset},
            "per_device_train_batch_size": {"value": 16, "origin": preset},
            "learning_rate": {"value": 0.002, "origin": preset},
            "lr_scheduler_type": {"value": "cosine", "origin": preset},
            "max_length": {"value": 256, "origin": "yours"},
            "backend": {"value": "auto", "origin": "default"},
            "seed": {"value": 0, "origin": "default"},
        },
        "source": {
            "source": "data/micro/distilqwen.parquet",
            "revision": None,
            "sha256": "0a1b2c3d",
            "slice": "train[:9900]",
            "licence": "MIT",
        },
        "levels": None if mode == "system1" else _levels(),
    }


def _reduction(losses: list) -> dict:
    first, last = losses[0][1], losses[-1][1]
    return {"first": first, "last": last, "share": 1 - last / first}


def _levels() -> dict:
    joint = [[0, 0, 412], [0, 1, 388], [0, 2, 71], [1, 0, 96], [1, 1, 803], [1, 2, 922], [1, 3, 204], [2, 2, 310], [2, 3, 727], [2, 4, 330]]
    rv, cd = {}, {}
    for row, column, count in joint:
        rv[str(row)] = rv.get(str(row), 0) + count
        cd[str(column)] = cd.get(str(column), 0) + count
    return {"rv": rv, "cd": cd, "joint": joint}


# Speed, targets, tables


def _speed() -> dict:
    models = {
        "teacher 8-bit": _timed("teacher", 8, 1_685_888, 1_799_040, 212.0),
        "teacher 16-bit": _timed("teacher", 16, 1_685_888, 3_371_776, 431.0),
        "system1": _timed("system1", 32, 657_024, 2_628_096, 705.0),
        "system2": _timed("system2", 32, 657_024, 2_628_096, 615.0),
    }
    ratios = [_ratio(models, student, teacher) for student in ("system1", "system2") for teacher in ("teacher 8-bit", "teacher 16-bit")]
    return {"runs": 20, "rounds": 2, "warm_up": 2, "lengths": [128, 256], "batch_size": 8, "models": models, "ratios": ratios}


def _ratio(models: dict, student: str, teacher: str) -> dict:
    small, large = models[student], models[teacher]
    speed = small["tokens_per_second"]["value"] / large["tokens_per_second"]["value"]
    saved = {f"{what}_saved": 1 - small[key] / large[key] for what, key in (("memory", "weight_bytes"), ("parameters", "parameters"))}
    return {"student": student, "teacher": teacher, "speed": _value(speed, 20, 0.06), **saved}


def _timed(model: str, bits: int, parameters: int, weight_bytes: int, pace: float) -> dict:
    def seconds(tokens: int) -> dict:
        return {"p50": _value(tokens / pace, 20, 0.01), "p95": _value(1.12 * tokens / pace, 20, 0.02)}

    return {
        "model": model,
        "bits": bits,
        "device": "cpu",
        "parameters": parameters,
        "weight_bytes": weight_bytes,
        "peak_bytes": None,
        "load_seconds": 0.4,
        "first_token_seconds": {"p50": _value(1.4 / pace, 20, 0.0004), "p95": _value(2.1 / pace, 20, 0.0009)},
        "seconds": {"128": seconds(128), "256": seconds(256)},
        "tokens_per_second": _value(pace, 20, 0.03 * pace),
        "batched": {"tokens_per_second": _value(5.2 * pace, 6, 0.1 * pace), "answers_per_second": _value(5.2 * pace / 128, 6, 0.04)},
    }


def _targets(cases: dict) -> list[dict]:
    def target(name: str, system: str, wanted: str, value: float, shown: str, ci: list, met: bool, note: str = "") -> dict:
        return {"name": name, "system": system, "wanted": wanted, "value": value, "shown": shown, "ci": ci, "met": met, "note": note}

    def kept(mode: str) -> dict:
        share = sum(case["answers"][mode]["right"] for case in cases[mode]) / len(cases[mode])
        interval = [share - 0.012, min(1.0, share + 0.011)]
        return target("quality kept", mode, "at least 90%", share, f"{share:.1%}", interval, True, "exact match, of the teacher's")

    return [
        kept("system1"),
        kept("system2"),
        target(
            "speed", "system1", "at least 3 ×", 705 / 212, "3.33 ×", [3.27, 3.39], True, "tokens/s at batch 1, against the 8-bit teacher"
        ),
        target("speed", "system2", "at least 3 ×", 2.90, "2.90 ×", [2.84, 2.96], False, "tokens/s at batch 1, against the 8-bit teacher"),
        target("p95 for 128 tokens", "system1", "below 2 s", 0.203, "0.20 s", [0.18, 0.22], True),
        target("p95 for 128 tokens", "system2", "below 2 s", 0.205, "0.21 s", [0.18, 0.23], True),
        target("p95 for 256 tokens", "system1", "below 3 s", 0.407, "0.41 s", [0.39, 0.43], True),
        target("p95 for 256 tokens", "system2", "below 3 s", None, "", None, None, "the model has too few positions"),
        target(
            "reasoning shown",
            "system2",
            "at least 80%",
            1.0,
            "100.0%",
            [0.94, 1.0],
            True,
            "share of answers that reason before they answer",
        ),
    ]


def _benchmarks() -> dict:
    def measured(value: float) -> dict:
        return {"gsm8k": {"exact_match,strict-match": {"value": value, "stderr": 0.011, "n": 100}}}

    return {"teacher": measured(0.021), "system2": measured(0.014)}


def _controls() -> dict:
    return {
        "title": "Controls of System 1",
        "note": "The same student and questions, taught otherwise. Chance: always giving a family's commonest answer.",
        "columns": ["family", "student", "exact answers", "shuffled answers", "chance"],
        "rows": [["reverse", "1.000", "1.000", "0.000", "0.001"], ["parity", "1.000", "1.000", "0.525", "0.526"]],
    }
