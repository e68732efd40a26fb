"""Rows of the generators of reasoning-gym, `task:reasoning-gym/NAME`, and their own scores of answers.

The library, https://github.com/open-thought/reasoning-gym, is loaded when a generator is used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import zlib
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import islice
from typing import Any, Literal

from verl.config.layers import nearest_key

# In front of the name of a generator, behind `task:`.
PREFIX = "reasoning-gym/"
# Column of a row with the generator's name, its options and the metadata of the question.
COLUMN = "reasoning_gym"
# Options of a source that are not the generator's own.
_OWN_OPTIONS = ("size", "seed", "level")
_SIZES = {"train": 500, "test": 100}
# Every fifth question is held out.
_HELD_OUT = 5
# Draws for each row that is wanted, before the generator counts as one with fewer questions.
_DRAWS_PER_ROW = 20
# Generators without a reference answer that have an example of one in the metadata.
_EXAMPLES = {
    "graph_color": "possible_answer",
    "propositional_logic": "example_answer",
    "rubiks_cube": "example_correct_answer",
}
# Generators that are no source of rows of text, with the reason.
NOT_TASKS = {"composite": "it mixes other generators; name these as several sources, each with a weight"}


def gym_rows(
    name: str, options: Mapping[str, Any], split: Literal["train", "test"]
) -> Iterator[dict[str, Any]]:
    """Rows {prompt, answer, reasoning_gym} of a split, each with another question.

    A question belongs to one split, decided by a hash of its text: one in five is held out. So no held-out
    question is trained on, whatever the options and seeds of both sources are.

    Args:
        name: of the generator, such as chain_sum.
        options: `size`, the most rows (500, or 100 held out); `seed` (0), another one draws other rows;
            `level`, a difficulty from 0 of the generator's curriculum; and fields of its configuration.
        split: train or test.

    Raises:
        ValueError: no such generator or option, a value out of its bounds, or no question in this split.
    """
    own = {key: options[key] for key in _OWN_OPTIONS if key in options}
    fields = {key: value for key, value in options.items() if key not in ("size", "seed")}
    size, seed = own.get("size", _SIZES[split]), own.get("seed", 0)
    for key, value, least in (("size", size, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{PREFIX}{name}: need a whole number from {least} for {key}, got {value!r}")
    # The generators seed question i by seed + i: those of seeds 0 and 1 would be the same but for one.
    spread = zlib.crc32(f"{name} {seed}".encode()) >> 1
    draws = (size + 10) * _DRAWS_PER_ROW
    dataset = generator(name, json.dumps(fields), seed=spread, size=draws)
    found = islice(_entries_of_split(dataset, draws, split), size)
    first = next(found, None)
    if first is None:
        raise ValueError(
            f"{PREFIX}{name}: need a question of the split {split}, got none in {draws} draws; give options "
            "that allow more questions"
        )
    yield _row(name, fields, first)
    for entry in found:
        yield _row(name, fields, entry)


def gym_score(column: Mapping[str, Any], answer: str) -> float:
    """The generator's own score of an answer.

    An answer that the generator's scoring cannot read, where it can read the reference, is wrong: 0.

    Args:
        column: of the row, as `gym_rows` wrote it.
        answer: text without anything around it.

    Returns:
        1 for a right answer; for others 0 or, with some generators, a share below 1.
    """
    name, fields = str(column["name"]), column["options"]
    dataset = generator(name, json.dumps(fields), seed=0, size=1)
    entry = restored(column["entry"])
    try:
        return float(dataset.score_answer(answer, entry))
    except Exception:  # of code that is not ours, on text that a model wrote
        dataset.score_answer(entry["answer"] or "", entry)  # raises if the row is at fault
        return 0.0


@cache
def generator(name: str, fields: str, *, seed: int, size: int) -> Any:
    """The generator of reasoning-gym with this name and configuration.

    Args:
        name: such as chain_sum.
        fields: of its configuration, as JSON, with `level` for one of its curriculum.
        seed: question i is drawn with seed + i.
        size: number of questions.

    Raises:
        ValueError: no such generator, field or level, a value out of its bounds, or the package is missing.
    """
    factory = _factory()
    check_name(name)
    given = {**json.loads(fields), "seed": seed, "size": size}
    dataset_class, config_class = factory.DATASETS[name]
    level = given.pop("level", None)
    known = [field.name for field in dataclasses.fields(config_class)]
    if unknown := [key for key in given if key not in known]:
        offered = [*_OWN_OPTIONS, *(key for key in known if key not in _OWN_OPTIONS)]
        raise ValueError(
            f"{PREFIX}{name} has no option {unknown[0]!r}; the nearest is "
            f"{nearest_key(unknown[0], offered)}, and there are {', '.join(offered)}"
        )
    try:
        return dataset_class(config_class(**{**_fields_of_level(name, level), **given}))
    except (AssertionError, TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{PREFIX}{name} does not take {fields}: {error}") from error


def check_name(name: str) -> None:
    """Check that there is a generator of this name that gives rows.

    Raises:
        ValueError: there is none, or the package is missing.
    """
    if name in NOT_TASKS:
        raise ValueError(f"task:{PREFIX}{name} is no task: {NOT_TASKS[name]}")
    if name not in (known := _factory().DATASETS):
        names = sorted(known.keys() - NOT_TASKS)
        raise ValueError(
            f"there is no task:{PREFIX}{name}; the nearest is task:{PREFIX}{nearest_key(name, names)}, and "
            f"there are {', '.join(names)}"
        )


def plain(value: Any) -> Any:
    """A value in the types of JSON, from which `restored` makes the same one again.

    Some generators compare tuples, or look up numbers in a mapping, neither of which JSON has.
    """
    if isinstance(value, tuple):
        return {"tuple": [plain(item) for item in value]}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value) and value.keys() not in ({"tuple"}, {"items"}):
            return {key: plain(item) for key, item in value.items()}
        return {"items": [[plain(key), plain(item)] for key, item in value.items()]}
    return value


def restored(value: Any) -> Any:
    """The value that `plain` was given."""
    if isinstance(value, list):
        return [restored(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    if value.keys() == {"tuple"}:
        return tuple(restored(item) for item in value["tuple"])
    if value.keys() == {"items"}:
        return {restored(key): restored(item) for key, item in value["items"]}
    return {key: restored(item) for key, item in value.items()}


def _entries_of_split(dataset: Any, draws: int, split: str) -> Iterator[dict[str, Any]]:
    """Entries of the split's questions, each once."""
    seen = set()
    for number in range(draws):
        entry = dataset[number]
        digest = hashlib.sha256(entry["question"].encode()).digest()
        is_held_out = digest[0] % _HELD_OUT == 0
        if digest not in seen and is_held_out == (split == "test"):
            seen.add(digest)
            yield entry


def _row(name: str, fields: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    answer = entry["answer"]
    if answer is None and name in _EXAMPLES:
        example = entry["metadata"][_EXAMPLES[name]]
        answer = example if isinstance(example, str) else json.dumps(example)
    column = {"name": name, "options": dict(fields), "entry": plain(dict(entry))}
    return {
        "prompt": [{"role": "user", "content": entry["question"]}],
        "answer": answer,
        COLUMN: column,
    }


def _fields_of_level(name: str, level: Any) -> dict[str, Any]:
    """Configuration of a level of the generator's curriculum; none without a level."""
    if level is None:
        return {}
    if name not in (curricula := _factory().CURRICULA):
        raise ValueError("it has no curriculum, so no levels; leave `level` out")
    curriculum = curricula[name]()
    most = max((len(attribute.levels) - 1 for attribute in curriculum.attributes.values()), default=0)
    if isinstance(level, bool) or not isinstance(level, int) or not 0 <= level <= most:
        raise ValueError(f"need a level from 0 to {most}, got {level!r}")
    curriculum.set_global_level(level)
    fields: dict[str, Any] = dict(vars(curriculum.generate_configuration()))
    return {key: value for key, value in fields.items() if key not in _OWN_OPTIONS}


def _factory() -> Any:
    """The tables of generators and curricula."""
    try:
        importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise ValueError(
            f"task:{PREFIX}... needs the package reasoning-gym: pip install 'verl[reasoning-gym]' ({error})"
        ) from error
    return importlib.import_module("reasoning_gym.factory")
