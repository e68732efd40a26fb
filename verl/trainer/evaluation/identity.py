"""Fingerprints of all that the answers of an evaluation and their rewards depend on."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from verl import __version__
from verl.config.agent import AgentConfig
from verl.config.data import WeightedChoice
from verl.config.run import TrainerConfig
from verl.rewards.library.reward_table import BY_DATA_SOURCE, REWARDS, load_function
from verl.trainer.evaluation.answering import EvalQuestion
from verl.trainer.evaluation.eval_sets import EvalSet
from verl.utils.hub import find_adapter
from verl.utils.tokens import TextCodec

# Files up to this size are read in full; of larger ones, these many blocks at even distances.
_WHOLE_BYTES, _NUM_BLOCKS, _BLOCK_BYTES = 1 << 24, 256, 1 << 16
# Files beside a model that generation does not read.
_UNREAD = re.compile(r"README\.md|.*\.(md|png|gguf|pt|bin\.index\.json)|\..*")
# Options of reward functions that may name a file.
_FILE_OPTIONS = ("schema_file", "rubric", "template")
# Settings of rewards that change no reward of an answer that has one.
_LIMITS = {"timeout_s", "max_failed_share", "isolation"}


def identity_of(
    config: TrainerConfig, sets: Sequence[EvalSet], questions: Sequence[EvalQuestion], codec: TextCodec
) -> dict[str, str]:
    """Fingerprints by part: model, engine, data, sampling, rewards and, of episodes, agent.

    Two evaluations with equal ones have the same answers and rewards. A large file of weights is known by
    its size and 256 blocks, which any training changes; a reward function by the file that it stands in,
    not by what this file imports.
    """
    policy, rollout = config.policy, config.rollout
    engine = [rollout.engine, rollout.engine_options.model_dump(mode="json"), rollout.has_servers]
    names = {choice.name for choice in _choices(config, sets)}
    # Only where there is one, so that evaluations of single answers stay what they were.
    agent = {"agent": digest(_agent_facts(config.agent))} if config.agent.is_on else {}
    return {
        **agent,
        "model": digest([digest_of_model(path) for path in _model_paths(config)]),
        "engine": digest([*engine, policy.precision, policy.lora.model_dump(mode="json")]),
        "data": digest([_facts(one, codec) for one in sets]),
        "sampling": digest([[asdict(q.params), dict(q.prompt.sampling), q.key] for q in questions]),
        "rewards": digest(
            [
                __version__,
                config.rewards.model_dump(mode="json", exclude=_LIMITS),
                *(digest_of_code(name) for name in sorted(names)),
                *sorted(digest_of_files(choice.options) for choice in _choices(config, sets)),
            ]
        ),
    }


def digest(content: Any) -> str:
    """16 hexadecimal digits of a value of plain types; others count by their text."""
    text = json.dumps(content, sort_keys=True, default=_text)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]


def digest_of_model(source: str) -> str:
    """Fingerprint of the files in a model's folder, or of the revision in the hub's cache."""
    folder = Path(source)
    if not folder.is_dir():
        cached = try_to_load_from_cache(source, "config.json")
        if not isinstance(cached, str):
            return source
        folder = Path(cached).parent
    files = sorted(path for path in folder.iterdir() if path.is_file() and not _UNREAD.fullmatch(path.name))
    return digest([[path.name, digest_of_file(path)] for path in files])


def digest_of_file(path: Path) -> str:
    """Fingerprint of a file; a large one is read at evenly spaced places."""
    size, known = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES:
            known.update(file.read())
        else:
            for i in range(_NUM_BLOCKS):
                file.seek((size - _BLOCK_BYTES) * i // (_NUM_BLOCKS - 1))
                known.update(file.read(_BLOCK_BYTES))
    return f"{size}:{known.hexdigest()}"


def digest_of_code(name: str) -> str:
    """Fingerprint of the file with a reward function; its name, if there is no such file, or several."""
    if name == BY_DATA_SOURCE or (name in REWARDS and not REWARDS[name].function):
        return name  # The version of the package stands for the code of judges.
    function = load_function(name)
    called = function if inspect.isroutine(function) or inspect.isclass(function) else type(function)
    try:
        return digest_of_file(Path(inspect.getfile(inspect.unwrap(called))))
    except (TypeError, OSError):
        return name


def _agent_facts(config: AgentConfig) -> list[Any]:
    """All settings of episodes, and the files of the user's own parts."""
    program = [config.program] if isinstance(config.program, str) else list(config.program or ())
    names = [*(tool.name for tool in config.tools), *program]
    names += [config.environment.name] if config.environment else []
    files = [Path(name.partition(":")[0]) for name in names]
    known = [digest_of_file(file) for file in files if file.suffix in (".py", ".yaml") and file.is_file()]
    return [config.model_dump(mode="json", exclude={"max_processes"}), *known]


def digest_of_files(options: Mapping[str, Any]) -> str:
    """Fingerprint of the files and models that options of a reward function name, such as a rubric."""
    texts = {name: value for name, value in sorted(options.items()) if isinstance(value, str)}
    # A rubric may be a text, too, which is no path if it is long.
    files = {
        name: Path(texts[name]).expanduser() for name in _FILE_OPTIONS if 0 < len(texts.get(name, "")) < 256
    }
    known = [[name, digest_of_file(path)] for name, path in files.items() if path.is_file()]
    return digest([known, digest_of_model(texts["path"]) if "path" in texts else ""])


def _model_paths(config: TrainerConfig) -> Iterator[str]:
    """Folders and hub names of the policy, of its adapter, and of an adapter's base."""
    for path in (config.policy.path, config.policy.lora.path):
        if path is not None:
            yield path
            if adapter := find_adapter(path):
                yield adapter.base


def _choices(config: TrainerConfig, sets: Sequence[EvalSet]) -> Iterator[WeightedChoice]:
    yield from config.rewards.functions
    yield from (prompt.reward for one in sets for prompt in one.prompts if prompt.reward)


def _facts(one: EvalSet, codec: TextCodec) -> list[Any]:
    """All of a set that the model or a reward function reads."""
    return [
        one.name,
        *(
            [
                p.index,
                codec.encode_prompt(p),
                p.content,
                p.answer,
                p.source,
                p.columns,
                p.reward and p.reward.model_dump(mode="json"),
            ]
            for p in one.prompts
        ),
    ]


def _text(value: Any) -> str:
    """Stand-in for a value that JSON does not know."""
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    return json.dumps(dict(value), default=str) if isinstance(value, Mapping) else str(value)
