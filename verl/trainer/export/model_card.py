"""Model cards: a README.md for people and the hub, from the settings and the metrics of a run."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from verl import __version__
from verl.config.run import PreferenceConfig, RewardModelConfig, RunConfig, SFTConfig, TrainerConfig
from verl.monitoring.display import save_curve
from verl.monitoring.formatting import format_number
from verl.trainer.export.base_files import BaseFiles, is_hub_name
from verl.trainer.export.public_values import public_name, public_value

CARD, PICTURE = "README.md", "training.png"
# Settings that describe the machine or the folder of a run, or that the card has elsewhere.
_NOT_SHOWN = (
    "output_dir", "device", "data", "checkpoint", "tracking", "placement", "rollout", "hybrid_engine",
    "evaluation", "policy.path", "critic.path",
)  # fmt: skip
_CURVES = ("reward", "accuracy", "loss", "kl", "entropy", "response_tokens")
_MAX_ROWS = 11
_SEQUENCE_CLASS, _CAUSAL_CLASS = "AutoModelForSequenceClassification", "AutoModelForCausalLM"


@dataclass(frozen=True)
class CardFacts:
    """Content of a model card.

    Attributes:
        kind: class of the model in `verl.engines.hf.models`.
        settings: of the run, as JSON values.
        base: the model that the run started from.
        step: steps that the model has learned.
        run_folder: has metrics.jsonl; None: the card has no curves.
        num_rows: rows of the training data; None: not known.
        is_adapter: the folder has a LoRA adapter alone.
    """

    kind: str
    settings: Mapping[str, Any]
    base: BaseFiles
    step: int
    run_folder: Path | None = None
    num_rows: int | None = None
    is_adapter: bool = False

    @property
    def run_class(self) -> type[RunConfig]:
        """Class of the run's settings."""
        if "algorithm" in self.settings:
            return TrainerConfig
        if "loss" not in self.settings:
            return SFTConfig
        return PreferenceConfig if "reference" in self.settings else RewardModelConfig

    def history(self) -> list[dict[str, Any]]:
        """Metrics of the steps up to this model's, the oldest first."""
        path = self.run_folder / "metrics.jsonl" if self.run_folder else None
        if path is None or not path.exists():
            return []
        rows = []
        for line in path.read_bytes().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # cut off by a stop of the run
            if row.get("step", self.step + 1) <= self.step:
                rows.append(row)
        return rows


def write_card(folder: Path, facts: CardFacts, *, with_picture: bool = False) -> None:
    """Write README.md, and a picture of the training curve if it is wanted and there is one.

    The card has no paths, addresses or keys of the settings: see `public_values`.
    """
    history = facts.history()
    curves = [name for name in _CURVES if sum(row.get(name) is not None for row in history) > 1]
    picture = curves[:1] if with_picture else []
    for name in picture:
        points = [(row["step"], row[name]) for row in history if row.get(name) is not None]
        steps, values = zip(*points, strict=True)
        save_curve(folder / PICTURE, steps, values, title=f"{name} over steps", ylabel=name)
    sections = [
        f"---\n{_metadata(facts).to_yaml()}\n---",
        f"# {_title(folder, facts)}",
        _summary(facts),
        f"## Load it\n\n```python\n{_loading_code(facts)}\n```",
        f"## Settings\n\nThose that differ from the defaults of verl.\n\n{_settings_table(facts)}",
        f"## Data\n\n{_data_lines(facts)}",
        _evaluation(history),
        _curves_section(history, curves, has_picture=bool(picture)),
        f"## Versions\n\n{_versions()}",
    ]
    (folder / CARD).write_text("\n\n".join(section for section in sections if section) + "\n")


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    cells = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)


def changed_settings(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted name whose value is not the default, without those that are nobody's business."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        default = defaults.get(key)
        if key in _NOT_SHOWN or value == default:
            continue
        # Another function than the default one is one value with its options: they have no defaults here.
        if is_same_section(value, default):
            assert default is not None
            inner = {f"{key}.{name}": item for name, item in changed_settings(value, default).items()}
            found |= {name: item for name, item in inner.items() if name not in _NOT_SHOWN}
        else:
            found[key] = value
    return found


def is_same_section(value: Any, default: Any) -> bool:
    """True if both are sections of settings, or options of one function."""
    if not (isinstance(value, Mapping) and isinstance(default, Mapping)):
        return False
    return value.keys() == default.keys() and value.get("name") == default.get("name")


def _title(folder: Path, facts: CardFacts) -> str:
    """Name of the run, or of the folder."""
    return facts.run_folder.name if facts.run_folder and facts.run_folder.name else folder.name


def _metadata(facts: CardFacts) -> ModelCardData:
    tasks = {"PolicyModel": "text-generation", "RewardModel": "text-classification"}
    methods = {
        TrainerConfig: "reinforcement-learning",
        SFTConfig: "sft",
        PreferenceConfig: "preference-optimization",
        RewardModelConfig: "reward-model",
    }
    algorithm = facts.settings.get("algorithm", {}).get("advantage", {}).get("name", "")
    known = facts.base.card
    data = [name for name in _sources(facts.settings, "train") if is_hub_name(name)]
    return ModelCardData(
        base_model=facts.base.hub_name,
        library_name="peft" if facts.is_adapter else "transformers",
        license=known.get("license"),
        license_name=known.get("license_name"),
        license_link=known.get("license_link"),
        language=known.get("language"),
        datasets=data or None,
        pipeline_tag=tasks.get(facts.kind),
        tags=["verl", methods[facts.run_class], *([algorithm] if algorithm.isidentifier() else [])],
    )


def _summary(facts: CardFacts) -> str:
    settings = facts.settings
    base = facts.base.hub_name or public_name(facts.base.name) or "a model given to the program"
    if facts.run_class is TrainerConfig:
        chosen = settings["algorithm"]
        how = (
            f"reinforcement learning (advantage `{public_value(chosen['advantage']['name'])}`, loss "
            f"`{public_value(chosen['policy_loss']['name'])}`)"
        )
    elif facts.run_class is SFTConfig:
        how = "supervised fine-tuning on reference answers"
    else:
        how = f"training on pairs of answers (loss `{public_value(settings['loss']['name'])}`)"
    what = {"PolicyModel": "Language model", "RewardModel": "Reward model", "ValueModel": "Value model"}
    form = " The folder has a LoRA adapter, to be loaded on the base model." if facts.is_adapter else ""
    return f"{what[facts.kind]} trained from `{base}` with verl: {how}, {facts.step} steps.{form}"


def _loading_code(facts: CardFacts) -> str:
    head = "from transformers import AutoTokenizer"
    folder = 'folder = "."  # of this model, or its name on the hub'
    tokenizer = "tokenizer = AutoTokenizer.from_pretrained(folder)"
    if facts.kind == "ValueModel":
        return "\n".join(
            (
                "from safetensors.torch import load_file",
                "from transformers import AutoModel, AutoTokenizer",
                "",
                folder,
                "transformer = AutoModel.from_pretrained(folder)",
                'head = load_file(f"{folder}/value_head.safetensors")  # weight [1, hidden], bias [1]',
                tokenizer,
                "# values = transformer(ids).last_hidden_state @ head['weight'].T + head['bias']",
            )
        )
    name = _SEQUENCE_CLASS if facts.kind == "RewardModel" else _CAUSAL_CLASS
    if facts.is_adapter:
        name = name.replace("AutoModel", "AutoPeftModel")
        lines = [f"from peft import {name}", head]
    else:
        lines = [f"from transformers import {name}, AutoTokenizer"]
    return "\n".join((*lines, "", folder, f"model = {name}.from_pretrained(folder)", tokenizer))


def _settings_table(facts: CardFacts) -> str:
    defaults = facts.run_class().model_dump(mode="json")
    changed = {"steps": facts.step} | changed_settings(facts.settings, defaults)
    rows = [(f"`{name}`", f"`{json.dumps(public_value(value, name))}`") for name, value in changed.items()]
    return markdown_table(("setting", "value"), rows)


def _data_lines(facts: CardFacts) -> str:
    train, test = (
        ", ".join(f"`{public_name(name)}`" for name in _sources(facts.settings, split))
        for split in ("train", "test")
    )
    count = f", {facts.num_rows} rows" if facts.num_rows is not None else ""
    evaluation = f"\n- evaluation: {test}" if test else ""
    return f"- training: {train or 'given by a program'}{count}{evaluation}"


def _sources(settings: Mapping[str, Any], split: str) -> list[str]:
    """Sources of a split: one or several texts."""
    given = settings.get("data", {}).get(split)
    entries = given if isinstance(given, list | tuple) else [given]
    return [str(entry) for entry in entries if isinstance(entry, str)]


def _evaluation(history: Sequence[Mapping[str, Any]]) -> str:
    """Held-out metrics of the first and the last evaluation."""
    measured = [row for row in history if any(name.startswith("eval/") for name in row)]
    if not measured:
        return ""
    first, last = measured[0], measured[-1]
    names = [name for name in last if name.startswith("eval/") and last[name] is not None]
    rows = [(f"`{name}`", _number(first.get(name)), _number(last[name])) for name in names]
    titles = ("metric", f"after step {first['step']}", f"after step {last['step']}")
    return f"## Evaluation\n\nOn held-out data.\n\n{markdown_table(titles, rows)}"


def _curves_section(history: Sequence[Mapping[str, Any]], curves: Sequence[str], *, has_picture: bool) -> str:
    """A table of some steps, evenly spaced, and the picture."""
    if not curves:
        return ""
    steps = [row for row in history if any(row.get(name) is not None for name in curves)]
    last = len(steps) - 1
    chosen = sorted({round(i * last / (_MAX_ROWS - 1)) for i in range(_MAX_ROWS)})
    rows = [[str(steps[i]["step"]), *(_number(steps[i].get(name)) for name in curves)] for i in chosen]
    picture = f"![{curves[0]} over steps]({PICTURE})\n\n" if has_picture else ""
    return f"## Training\n\n{picture}{markdown_table(['step', *(f'`{name}`' for name in curves)], rows)}"


def _number(value: Any) -> str:
    return format_number(float(value)) if isinstance(value, int | float) else "-"


def _versions() -> str:
    """Versions of the programs that decide on the result."""
    found = [f"verl {__version__}", f"Python {platform.python_version()}"]
    for package in ("torch", "transformers", "peft"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
