"""`verl data`: what a run reads of a data set, and what is odd in it."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from verl.cli.inspection.data_facts import (
    KINDS,
    DataFacts,
    columns_of,
    encode,
    layouts_of,
    plain_samples,
    read_facts,
    spread,
)
from verl.cli.inspection.data_oddities import MOST_CHECKED, comparisons, oddities, token_oddities
from verl.config.data import AnswersDataConfig
from verl.config.layers import Stage, override_layers
from verl.config.loader import build_config
from verl.config.run import RunConfig
from verl.data.reading.memory_rows import with_memory
from verl.monitoring.progress import print_line
from verl.monitoring.samples import one_line
from verl.utils.hub import why_missing
from verl.utils.tokens import TextCodec

# Rows that are read of a source that is streamed.
_STREAMED_ROWS = 10_000
_EXAMPLES = 3


def show_data(args: argparse.Namespace) -> int:
    """`verl data`; 1 if the data cannot be read as a run would."""
    is_override = "=" in args.source and not Path(args.source).exists() and args.source[0] not in "{["
    given = [args.source] if is_override else [f"data.{args.split}={args.source}"]
    given += [f"policy.path={args.model}"] if args.model else []
    kind, _ = KINDS[args.kind]
    layers = override_layers([*given, *args.overrides], stage=Stage.OVERRIDE, kind=kind)
    config = build_config(kind, layers, check_relations=False)
    try:
        report = data_report(args.kind, config, args.split, num_samples=args.samples, limit=args.rows)
    except ValueError as error:
        Console(stderr=True).out(f"verl: {error}", highlight=False)
        return 1
    if args.json:
        text = json.dumps(report, indent=2, default=str, ensure_ascii=False)
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(text + "\n", encoding="utf-8")
    console = Console()
    for line in report_lines(report):
        print_line(console, line)
    malformed = report["malformed"]
    stops = malformed["stops"] and malformed["count"] + report["refused"] > 0
    prompts = (report["tokens"] or {}).get("prompt", {})
    none_fits = "over" in prompts and prompts["over"] == report["rows"]["usable"] - report["refused"]
    return 1 if stops or none_fits else 0


def data_report(
    kind: str, config: RunConfig, split: str, *, num_samples: int = 2, limit: int | None = None
) -> dict[str, Any]:
    """Facts and oddities of the data that a configuration names, as JSON values.

    Args:
        kind: key of `KINDS`.
        config: of such a run; with `policy.path` the tokens are counted.
        split: train or test: which setting is reported on.
        num_samples: rows that are shown.
        limit: rows that are read of each source; none: all, but 10000 of a stream.

    Raises:
        ValueError: the data cannot be read, or has no usable row.
    """
    settings = {"train": config.data.train, "test": config.data.test}
    if (setting := settings[split]) is None:
        raise ValueError(f"need a source, or data.{split}=SOURCE")
    for option, count, least in (("--rows", limit, 1), ("--samples", num_samples, 0)):
        if count is not None and count < least:
            raise ValueError(f"need {option} of at least {least}, got {count}")
    codec = _codec(config)
    for name, value in settings.items():
        with_memory(value, None, "train" if name == "train" else "test")  # no program hands rows over
    limits = {name: limit or _stream_limit(value) for name, value in settings.items()}
    facts = read_facts(kind, setting, config, "train" if split == "train" else "test", limit=limits[split])
    held_out = None
    if split == "train" and settings["test"] is not None:
        held_out = read_facts(kind, settings["test"], config, "test", limit=limits["test"])
    warnings = list(oddities(facts, held_out))
    report: dict[str, Any] = {
        "kind": kind,
        "source": facts.report.source,
        "rows": {"read": facts.report.num_rows, "usable": len(facts.prompts), "all": facts.num_rows},
        "malformed": {
            "count": facts.report.num_malformed,
            "first": facts.report.problems,
            "stops": config.data.on_malformed == "stop",
        },
        "refused": 0,
        "layouts": dict(layouts_of(facts)),
        "columns": {name: vars(column) for name, column in columns_of(facts.rows).items()},
        "references": _references(facts),
        "tokens": None,
        "samples": plain_samples(facts, num_samples),
    }
    if codec is not None:
        part_limits = _limits(config)
        encoded = encode(facts, codec, num_samples=num_samples)
        report["refused"], report["samples"] = len(encoded.refused), encoded.samples
        report["tokens"] = {
            name: spread(lengths, part_limits.get(name, (None, ""))[0])
            for name, lengths in encoded.lengths.items()
        }
        warnings += token_oddities(facts, encoded, codec, part_limits)
    for sample, prompt in zip(report["samples"], facts.prompts, strict=False):
        if kind == "train" and prompt.answer is not None:
            sample["reference"] = str(prompt.answer)
    return {**report, "warnings": warnings}


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """The report as lines of text."""
    rows, malformed = report["rows"], report["malformed"]
    of_all = f" of {rows['all']}" if rows["all"] not in (None, rows["read"]) else ""
    lines = [f"source: {report['source']}", f"rows: {rows['read']} read{of_all}, {rows['usable']} usable"]
    if malformed["count"]:
        effect = (
            "stop a run (data.on_malformed=skip skips them)"
            if malformed["stops"]
            else "are skipped, as data.on_malformed says"
        )
        lines.append(f"{malformed['count']} rows cannot be used, and {effect}:")
        lines += [f"  {problem}" for problem in malformed["first"]]
    lines += [f"layout: {name} ({count} rows)" for name, count in report["layouts"].items()]
    lines += ["", "columns:"]
    for name, column in report["columns"].items():
        types = ", ".join(f"{kind} {count}" for kind, count in column["types"].items()) or "nothing"
        empty = f"; empty {100 * column['empty'] / max(1, rows['read']):.3g} %" if column["empty"] else ""
        lines.append(f"  {name}: {types}{empty}; such as {_short(column['example'])}")
    if references := report["references"]:
        types = ", ".join(f"{kind} {count}" for kind, count in references["types"].items())
        lines += [
            "",
            f"reference answers: {types}; {references['different']} different, {references['none']} none",
        ]
        lines.append(f"  such as {', '.join(map(_short, references['examples']))}")
        able = ", ".join(f"{name} {count}" for name, count in references["comparable"].items()) or "none"
        lines.append(f"  built-in rewards that can compare them, of {references['tried']}: {able}")
    if report["tokens"]:
        lines += ["", "tokens:"]
        for name, facts in report["tokens"].items():
            figures = ", ".join(f"{key} {value:g}" for key, value in facts.items())
            lines.append(f"  {name}: {figures}")
    else:
        lines += ["", "tokens are not counted: name a model with --model"]
    lines += [
        "",
        "first rows" + (", with the special tokens that the model reads:" if report["tokens"] else ":"),
    ]
    for sample in report["samples"]:
        lines += [f"  {name:9}  {one_line(text)}" for name, text in sample.items()] + [""]
    if report["warnings"]:
        lines += ["to look at:", *(f"  - {one_line(warning)}" for warning in report["warnings"])]
    else:
        lines.append("nothing odd was found")
    return lines


def _codec(config: RunConfig) -> TextCodec | None:
    path = config.policy.path
    if path is None:
        return None
    if reason := why_missing(path):
        raise ValueError(f"need the tokenizer of a model, got {path!r}: {reason}")
    return TextCodec.for_run(path, config.data)


def _stream_limit(setting: Any) -> int | None:
    sources = setting if isinstance(setting, tuple) else [setting]
    return _STREAMED_ROWS if any(getattr(one, "streaming", False) for one in sources) else None


def _limits(config: RunConfig) -> dict[str, tuple[int, str]]:
    """Part of a row -> the most tokens that it may have, and the setting that says so."""
    limits = {"prompt": (config.data.max_prompt_tokens, "data.max_prompt_tokens")}
    if isinstance(config.data, AnswersDataConfig) and config.data.max_sequence_tokens is not None:
        limits["row"] = (config.data.max_sequence_tokens, "data.max_sequence_tokens")
    return limits


def _references(facts: DataFacts) -> dict[str, Any] | None:
    if facts.kind != "train":
        return None
    answers: Sequence[Any] = [prompt.answer for prompt in facts.prompts]
    given = [answer for answer in answers if answer not in (None, "", [])]
    names = Counter({"str": "text"}.get(type(a).__name__, type(a).__name__) for a in given)
    different = {repr(answer): answer for answer in given}
    tried = [comparisons(prompt) for prompt in facts.prompts[:MOST_CHECKED] if prompt.answer is not None]
    return {
        "types": dict(names),
        "none": len(answers) - len(given),
        "different": len(different),
        "examples": list(different.values())[:_EXAMPLES],
        "tried": len(tried),
        "comparable": dict(Counter(name for one in tried for name, reason in one.items() if not reason)),
    }


def _short(value: Any) -> str:
    text = one_line(value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False))
    return text if len(text) <= 60 else f"{text[:57]}..."
