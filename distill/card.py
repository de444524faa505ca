"""The model card of a checkpoint: its README.md, with the metadata that the hub reads (huggingface.co/docs/hub/model-cards).

It says only what the checkpoint's record, its rows and an evaluation say. Names and texts of others are shown, never rendered; of a folder
of this machine only the last name.
"""

import json
import re
import shlex
from collections import Counter
from pathlib import Path

from . import checkpoint, markdown, store
from .config import is_hub_name
from .console import say, visible
from .errors import ConfigError, shortened, without_secrets
from .generation import MAX_NEW_TOKENS
from .models import RUN_RECORD, fingerprint
from .prompt import format_prompt

CARD = "README.md"
QUESTION = "What is 12 + 34?"
SYSTEMS = {"system1": "System-1 student, which answers at once", "system2": "System-2 student, which reasons before it answers"}
# (key of an evaluation's quality, what the table calls it, the hub's name of the metric or None)
METRICS = (
    ("exact_match", "exact match", "exact_match"),
    ("token_f1", "token F1", "f1"),
    ("rouge_l", "ROUGE-L", "rouge"),
    ("bleu", "BLEU, 0 to 100", "bleu"),
    ("math_verified", "verified mathematics", "accuracy"),
    ("perplexity", "perplexity on the references", "perplexity"),
    ("agreement", "agreement with the teacher's next token", None),
    ("reasoned", "reasons before it answers", None),
    ("stopped", "stops by itself", None),
    ("tokens", "tokens an answer", None),
)
LANGUAGES = {"alibaba-pai/OmniThought": "en"}  # as the set's own card says
_QWEN = re.compile(r"Qwen/Qwen2\.5-(0\.5B|1\.5B|3B|7B|14B|32B|72B)(-Instruct)?")
_QWEN_OTHER = {"3B": "qwen-research", "72B": "qwen"}  # all other sizes: Apache-2.0
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_PLACES = ("out_dir", "config_path", "labeled_path")
# a path: of this machine's root, a home, a drive, a network (\\server), or upwards from somewhere; its folders' names may hold spaces
_NAME = r"[^\s/\\'\"`,;|<>()]+"
_SPACED = rf"{_NAME}(?: {_NAME}){{0,3}}"
_STEP = rf"/{_SPACED}(?=/)|\\{_SPACED}(?=\\)|[/\\]{_NAME}"
_PLACE = re.compile(rf"(?<![\w:/.\\])(?:\.\.(?:{_STEP})|(?:file://)?(?:~\w*|[A-Za-z]:|[/\\])?(?:{_STEP}){{2}})(?:{_STEP})*[/\\]?")
_WHOLE_PLACE = re.compile(r"[/~]|[A-Za-z]:[\\/]|\\\\\w|(?:[\w.-]+[\\/])*\.\.[\\/]")
_HOME = re.compile(r"~(?:[A-Za-z]\w*)?|(?:[A-Za-z]:)?/(?:.*/)?(?:home|Users)/[^/]+")
_MARK = re.compile(r"\n<!-- as the lab wrote it: ([0-9a-f]{64}) -->\n\Z")
_TITLE, _CODE_NAME = re.compile(r"^# .*", re.MULTILINE), re.compile(r"^name = \".*(?=  # a folder, or a name on the hub$)", re.MULTILINE)


def write_model_card(path: str | Path, evaluation=None, *, license: str | None = None, out: str | Path | None = None) -> str:
    """Write the card of a checkpoint of the lab. Returns its path.

    path        the checkpoint's folder
    evaluation  what `evaluate_student` returned, its dict, or the path of its JSON; None: the card says that nothing was measured
    license     the hub's identifier, e.g. "apache-2.0"; None takes the base model's where that is known, else "other"
    out         where to; None: README.md in the checkpoint. Another text that stands there is kept as `<out>.previous`
    Raises ConfigError for a folder that is no checkpoint of the lab or an evaluation of other models, DataError for a damaged one.
    """
    folder = store.resolve(path)
    content = compose(folder, read_record(folder), evaluation, license)
    place = store.resolve(out) if out else folder / CARD
    if store.is_file(place) and place.read_text(encoding="utf-8", errors="replace") != content:
        with store.cannot_write(place):
            place.replace(place.with_name(f"{place.name}.previous"))
        say(f"{store.shown(place)}: what stood there is kept as {place.name}.previous")
    with store.atomic_file(place) as file:
        file.write(content)
    return str(place)


def read_record(folder: Path) -> dict:
    """The record of a checkpoint of the lab whose files are as published. Raises ConfigError where it is none, DataError if damaged."""
    if not store.is_dir(folder):
        raise ConfigError(f"Model not found at {store.shown(folder)}: there is no such folder.")
    record = store.read_manifest(folder, name=RUN_RECORD)
    if record is None or "job" not in record:
        raise ConfigError(f"{store.shown(folder)} is no checkpoint of the lab: it holds no {RUN_RECORD}. Give a student's folder.")
    return record


def compose(folder: Path, record: dict, evaluation=None, license: str | None = None, name: str | None = None) -> str:
    """The text of a card.

    name  what loads the model: its name on the hub; None: the folder's last name, for somebody beside it
    """
    from huggingface_hub import ModelCard

    scores = _scores(folder, record, evaluation) if evaluation is not None else None
    rows = _provenance(record)
    metadata = _metadata(folder, record, rows, scores, license)
    sections = [
        _title(name or folder.name),
        _summary(record),
        *(["## Quantised", _quantised(record["export"])] if "export" in record else []),
        "## Use",
        _usage(record, name or folder.name),
        "## How it was made",
        _making(record, rows),
        "## Results",
        _results(scores) if scores else "No evaluation was given when this card was written: nothing is claimed of its quality.",
        "## Limits, and what was not measured",
        _limits(record, metadata),
        "## Reproduce",
        _reproduction(record),
    ]
    return _marked(str(ModelCard("\n\n".join([f"---\n{metadata.to_yaml(line_break=chr(10))}\n---", *sections]) + "\n")))


def _marked(content: str) -> str:
    """A card with a last line, not shown, that tells whether somebody edited it."""
    return f"{content}\n<!-- as the lab wrote it: {store.hash_json(content)} -->\n"


def is_unedited(content: str) -> bool:
    """Whether a card is as the lab wrote it."""
    mark = _MARK.search(content)
    return bool(mark) and mark[1] == store.hash_json(content[: mark.start()])


def renamed(content: str, name: str) -> str:
    """A card whose title and code name the model `name`, such as its name on the hub; one that somebody edited as it is."""
    if not is_unedited(content):
        return content
    head, end, body = _MARK.sub("", content).partition("\n---\n")
    body = _TITLE.sub(lambda _: _title(name), body, count=1)
    return _marked(head + end + _CODE_NAME.sub(lambda _: _code_name(name), body, count=1))


def _title(name: str) -> str:
    return f"# {plain(name)}"


def _code_name(name: str) -> str:
    return f"name = {json.dumps(visible(name))}"


def problems(content: str) -> list[str]:
    """What the hub would object to, or a reader would miss, in a card's metadata; as far as that is known without asking the hub."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        data = ModelCard(content).data
    except (ValueError, TypeError, YAMLError) as error:
        return [f"the metadata at its top cannot be read: {shortened(error)}"]
    lacking = [f"its metadata name no {key}" for key in ("license", "library_name", "pipeline_tag") if not data.get(key)]
    unlicensed = data.license == "other" and not data.license_name
    return lacking + (["its license is unknown: give one, e.g. apache-2.0, if you may"] if unlicensed else [])


# What is known


def _scores(folder: Path, record: dict, evaluation) -> dict:
    """What an evaluation says of this checkpoint: {"name", "mode", "quality": {"student", "before", "teacher"}, "system", "all"}."""
    found = evaluation if isinstance(evaluation, dict) else evaluation.to_dict() if hasattr(evaluation, "to_dict") else None
    found, mode = store.read_json(evaluation) if found is None else found, mode_of(record)
    models = found.get("models") if isinstance(found, dict) else None
    if not isinstance(models, dict) or not isinstance(found.get("systems"), dict):
        raise ConfigError("The evaluation names no models and systems. Give what `evaluate` wrote, reports/evaluation/report.json.")
    mine = [name for name, model in models.items() if model["role"] == "after" and store.resolve(model["path"]) == folder]
    # at its place by now may stand another model than the one that was measured
    if not mine or models[mine[0]].get("fingerprint") != fingerprint(str(folder)) or mode not in models[mine[0]]["quality"]:
        others = ", ".join(public(model["path"]) for model in models.values())
        raise ConfigError(f"The evaluation is of other models than {store.shown(folder)}: {others}. Evaluate this checkpoint.")
    system = found["systems"].get(mode) or {}
    names = {"student": mine[0], "before": system.get("before"), "teacher": system.get("teacher")}
    quality = {role: models.get(name, {}).get("quality", {}).get(mode, {}) for role, name in names.items()}
    return {"name": mine[0], "mode": mode, "quality": quality, "system": system, "all": found}


def _provenance(record: dict) -> dict | None:
    """Where the rows come from and who wrote their answers, counted; None where the file is gone or another by now."""
    data = record.get("data") or {}
    file = data.get("labeled_path")
    if not file or not store.is_file(file) or store.hash_file(file) != data.get("labeled_sha256"):
        return None
    sources, writers = Counter(), Counter()
    for row in store.read_rows(file):
        sources[row.get("source") or "unknown", row.get("revision") or ""] += 1
        writers[row.get("teacher") or "whoever wrote the source"] += 1
    named = Counter()
    for (source, revision), count in sources.items():
        named[public(source), str(revision)] += count
    return {"sources": named, "writers": {public(writer): count for writer, count in writers.items()}}


def mode_of(record: dict) -> str:
    """How a checkpoint is asked; plainly, where no plan of the lab's says so."""
    return record["mode"] if record.get("mode") in SYSTEMS else "system1"


def _format(record: dict) -> str | None:
    return record["export"]["format"] if "export" in record else None


def public(name) -> str:
    """A model or data set as a stranger may see it: its name on the hub, or the last name of its place, "~" for
    a home folder, which bears its owner's name.

    >>> public("/home/me/models/mine")
    'mine'
    """
    name = shortened(visible(str(name)))
    if len(name) < 100 and is_hub_name(name):
        return name
    place = name.replace("\\", "/").rstrip("/")
    return "~" if _HOME.fullmatch(place) else place.rpartition("/")[2]


def for_strangers(value):
    """A JSON value with every path of a machine cut to its last name, and without keys and passwords.

    >>> for_strangers({"log": "see /home/me/run/train.log"})
    {'log': 'see train.log'}
    """
    if isinstance(value, dict):
        return {for_strangers(key): for_strangers(one) for key, one in value.items()}
    if isinstance(value, list):
        return [for_strangers(one) for one in value]
    if not isinstance(value, str):
        return value
    value = without_secrets(value)
    if _WHOLE_PLACE.match(value):
        return public(value)
    value = value.replace(f"{store.ROOT}/", "")  # whatever its name holds, spaces too
    return _PLACE.sub(lambda found: public(found[0]), value)


def plain(text) -> str:
    """A text of others for a line of Markdown: shown as it is, never rendered."""
    return markdown.plain(shortened(visible(str(for_strangers(str(text))))))


# The metadata


def _metadata(folder: Path, record: dict, rows: dict | None, scores: dict | None, license: str | None):
    from huggingface_hub import ModelCardData

    base = record["job"]["models"]["student"]
    sources = sorted({source for source, _ in rows["sources"] if "/" in source} if rows else ())
    exported = [f"{record['export']['bits']}-bit", _format(record)] if "export" in record else []
    relation = {"base_model": base, "base_model_relation": "finetune"} if is_hub_name(base) else {}
    languages = sorted({LANGUAGES[source] for source in sources if source in LANGUAGES})
    results = _eval_results(scores) if scores else None
    return ModelCardData(
        **_license(base, license),
        **relation,
        datasets=sources or None,
        language=languages or None,
        library_name="gguf" if _format(record) == "gguf" else "transformers",
        pipeline_tag="text-generation",
        tags=["distillation", mode_of(record).replace("system", "system-"), "qwen-distillation-lab", *exported],
        metrics=sorted({result.metric_type for result in results}) if results else None,
        eval_results=results,
        model_name=public(folder) if results else None,
    )


def _license(base: str, asked: str | None) -> dict:
    if asked and not _LICENSE.fullmatch(asked):
        raise ConfigError(f"license = {shortened(asked, 60)!r}: is no identifier of the hub's, which are like apache-2.0, mit or other.")
    known = _QWEN.fullmatch(base)
    if asked or not known:
        return {"license": asked or "other"}
    if known[1] not in _QWEN_OTHER:
        return {"license": "apache-2.0"}
    return {"license": "other", "license_name": _QWEN_OTHER[known[1]], "license_link": f"https://huggingface.co/{base}/blob/main/LICENSE"}


def _eval_results(scores: dict) -> list:
    from huggingface_hub import EvalResult

    questions, quality = scores["system"].get("questions", {}), scores["quality"]["student"]
    name = public(questions.get("source") or "held-out questions")
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=re.sub(r"[^\w.-]+", "-", name).strip("-") or "held-out",
            dataset_name=f"held-out questions, {name}",
            dataset_args={"sha256": str(questions.get("sha256"))},
            metric_type=metric,
            metric_name=title,
            metric_value=quality[key]["value"],
            metric_args={"n": quality[key]["n"], "interval_95": quality[key]["ci"]},
        )
        for key, title, metric in METRICS
        if metric and (quality.get(key) or {}).get("value") is not None
    ]


# The text


def _summary(record: dict) -> str:
    base, teacher = (record["job"]["models"].get(role) or "unknown" for role in ("student", "teacher"))
    kind = SYSTEMS[mode_of(record)]
    local = "" if is_hub_name(base) else " The base is a folder of whoever trained it, and has no name on the hub."
    return f"A {kind}: {_linked(base)}, trained on answers for the teacher {_linked(teacher)} by the Qwen Distillation Lab.{local}"


def _linked(name: str) -> str:
    return f"[{name}](https://huggingface.co/{name})" if is_hub_name(name) and "/" in name else plain(public(name))


def _quantised(made: dict) -> str:
    size = f"{made['bytes_before']:,} bytes of weights became {made['bytes_after']:,}"
    text = f"{made['bits']}-bit weights ({plain(made['format'])}) of {plain(made['of'])}: {size}."
    if not (scores := made.get("scores")):
        return f"{text} What that costs in quality was not measured."
    return f"{text}\n\n{_table(['', 'n', 'before', 'after'], before_and_after(scores))}\n\nIn brackets: 95% intervals."


def before_and_after(scores: dict) -> list[list]:
    """The rows of a table, [metric, n, before, after], of two models' quality {"before": Q, "after": Q}."""
    both = [(title, scores["before"].get(key), scores["after"].get(key)) for key, title, _ in METRICS]
    return [[title, before["n"], interval(before), interval(after)] for title, before, after in both if before and after]


def _usage(record: dict, name: str) -> str:
    if _format(record) == "gguf":
        return "With llama.cpp, on the `.gguf` file of this folder: `llama-cli -m FILE -p QUESTION`."
    mode = mode_of(record)
    asked = json.dumps(format_prompt(QUESTION, mode=mode))
    packages = "transformers torch accelerate bitsandbytes" if "export" in record else "transformers torch"
    return f"""`pip install {packages}`

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

{_code_name(name)}  # a folder, or a name on the hub
tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name)
question = [{{"role": "user", "content": {asked}}}]
asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True).to(model.device)
answer = model.generate(**asked, max_new_tokens={MAX_NEW_TOKENS[mode]}, do_sample=False)
print(tokenizer.decode(answer[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))
```"""


def _making(record: dict, rows: dict | None) -> str:
    decisive, origins = checkpoint.decisive_settings(record["job"]), record.get("settings", {})
    settings = {**decisive["training"], **decisive["lab"]}
    table = [[plain(key), plain(value), plain(origins.get(key, {}).get("origin", ""))] for key, value in settings.items()]
    lines = [f"- {line}" for line in (*_data_lines(record, rows), *_training_lines(record))]
    return "\n".join(lines) + "\n\nThe settings that decide the weights:\n\n" + _table(["setting", "value", "from"], table)


def _data_lines(record: dict, rows: dict | None) -> list[str]:
    data, metrics = record.get("data") or {}, record.get("metrics", {})
    validation = (data.get("validation") or {}).get("kept", 0)
    too_long = (data.get("train") or {}).get("too_long", 0)
    digest = plain(data.get("labeled_sha256") or record["tokens_sha256"])
    count = metrics.get("rows", "an unknown number of")
    lines = [f"Rows: {plain(count)} to train on, {validation} for validation; {too_long} dropped as too long. SHA-256 {digest}"]
    if rows is None:
        return [*lines, "Where the rows came from and who wrote their answers: the file was not at hand any more when this was written"]
    sources = [f"{plain(name)}{f' at {plain(revision)}' if revision else ''} ({n:,})" for (name, revision), n in rows["sources"].items()]
    writers = [f"{plain(name)} ({count:,})" for name, count in rows["writers"].items()]
    return [*lines, f"Sources: {', '.join(sources)}", f"Answers written by: {', '.join(writers)}"]


def _training_lines(record: dict) -> list[str]:
    metrics = record.get("metrics", {})
    loss = f"Loss per supervised token: {_number(metrics.get('first_loss'))} at first, {_number(metrics.get('last_loss'))} at last"
    if (best := metrics.get("best_validation_loss")) is not None:
        loss += f"; on validation rows {_number(best)}"
    versions = ", ".join(f"{plain(name)} {plain(number)}" for name, number in record.get("versions", {}).items())
    steps = f"{metrics.get('steps', 'unknown')} steps in {_number(metrics.get('train_seconds'))} s by the engine {record.get('backend')}"
    return [f"Training: {plain(steps)}", loss, f"Versions: {versions}"]


def _results(scores: dict) -> str:
    quality, retained = scores["quality"], scores["system"].get("retained") or {}
    rows = [
        [title, quality["student"][key]["n"], *(interval(quality[role].get(key)) for role in quality), interval(retained.get(key))]
        for key, title, _ in METRICS
        if quality["student"].get(key)
    ]
    questions = scores["system"].get("questions", {})
    source, checked = plain(public(questions.get("source") or "held out")), _checked(questions.get("leakage") or {})
    asked = f"Held-out questions of {source}; near-duplicates of training rows: {checked}. In brackets: 95% intervals."
    table = _table(["", "n", "this student", "before training", "teacher", "student / teacher"], rows)
    return "\n\n".join([asked, table, *_speed_lines(scores)])


def _checked(leakage: dict) -> str:
    """How many questions were near-duplicates of training rows, and what they were compared with."""
    if leakage.get("checked_against") is None:
        return f"not checked: {plain(leakage.get('why_unchecked') or 'the evaluation says nothing of it')}"
    return f"{plain(leakage['removed'])} removed, {plain(leakage['checked_against'])} training rows looked at"


def _speed_lines(scores: dict) -> list[str]:
    ratios = [ratio for ratio in (scores["all"].get("speed") or {}).get("ratios", []) if ratio["student"] == scores["name"]]
    device = plain((scores["all"].get("device") or {}).get("name", "an unknown device"))
    return [
        f"Tokens a second against {plain(ratio['teacher'])}: {interval(ratio['speed'])} times; memory of the weights "
        f"{-ratio['memory_saved']:+.1%}, parameters {-ratio['parameters_saved']:+.1%} (on {device})."
        for ratio in ratios
    ]


def _limits(record: dict, metadata) -> str:
    lines = [
        "Measured is what stands under Results, on questions like its training rows; other tasks, languages and long talks were not.",
        "Trained on single questions: an earlier turn of a conversation means nothing to it that training taught.",
        "Safety, bias and truthfulness were not measured. What the teacher gets wrong, it may have learnt.",
    ]
    if mode_of(record) == "system2":
        lines.append("Its reasoning is text that came before an answer; that the answer follows from it was not measured.")
    if metadata.license == "other" and not metadata.license_name:
        lines.append("License: not known to whoever made this card. The base model's, the teacher's and the data's terms hold.")
    return "\n".join(f"- {line}" for line in lines)


def _reproduction(record: dict) -> str:
    settings = record.get("settings", {})
    presets = [one["origin"].removeprefix("preset ") for one in settings.values() if one["origin"].startswith("preset ")]
    yours = {key: one["value"] for key, one in settings.items() if one["origin"] in ("yours", "job file") and key not in _PLACES}
    words = ["python", "distill_app.py", mode_of(record), *(["--preset", public(presets[0])] if presets else [])]
    for key, value in yours.items():
        words += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    line = visible(" ".join(shlex.quote(" ".join(str(for_strangers(word)).split())) for word in words))
    digest = plain((record.get("data") or {}).get("labeled_sha256") or record["tokens_sha256"])
    return f"In the lab's repository, on the rows with the SHA-256 {digest}:\n\n```sh\n{line}\n```"


def _table(columns: list[str], rows: list[list]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def interval(measured: dict | None) -> str:
    """A measured value with its interval, such as "0.94 [0.9, 0.97]"; "–" where there is none."""
    if not measured or measured.get("value") is None:
        return "–"
    bounds = f" [{', '.join(map(_number, measured['ci']))}]" if measured.get("ci") else ""
    return _number(measured["value"]) + bounds


def _number(value) -> str:
    return "unknown" if value is None else f"{value:.4g}"
