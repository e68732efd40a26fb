"""Facts of a data set as a run reads it: columns, layouts, lengths in tokens, reference answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from statistics import median
from typing import Any, Literal

from typing_extensions import override

from verl.config.data import AnswersDataConfig, DataConfig
from verl.config.run import PreferenceConfig, RewardModelConfig, RunConfig, SFTConfig, TrainerConfig
from verl.data.dataset import LoadReport, load_prompts
from verl.data.examples import answer_row, load_examples
from verl.data.loading.row_prompts import as_row
from verl.data.preference_pairs import Pair, load_pairs
from verl.data.reading.file_readers import PlacedRow
from verl.data.reading.layouts import ANSWER_COLUMNS, CHAT_COLUMNS, prompt_column
from verl.data.reading.placed_rows import RowStream
from verl.data.reading.row_cells import MalformedRow
from verl.data.reading.sources import SourceSetting, streams_of
from verl.utils.sampling_types import Prompt
from verl.utils.tokens import TextCodec

Split = Literal["train", "test"]
Load = Callable[..., tuple[list[Prompt], LoadReport]]
# Kind of run -> its settings, and its reader of data.
KINDS: dict[str, tuple[type[RunConfig], Load]] = {
    "train": (TrainerConfig, load_prompts),
    "sft": (SFTConfig, load_examples),
    "pairs": (PreferenceConfig, load_pairs),
    "reward-model": (RewardModelConfig, load_pairs),
}
_LAYOUTS = {"messages": "OpenAI", "conversations": "ShareGPT", "instruction": "Alpaca"}


@dataclass
class DataFacts:
    """A data set as a kind of run reads it.

    Attributes:
        kind: key of `KINDS`.
        config: settings of the data.
        rows: columns of each row that could be parsed.
        prompts: made of the usable rows.
        report: of the reader.
        is_cut: there are more rows, which were not read.
        num_rows: of all sources, if they are known.
    """

    kind: str
    config: DataConfig
    rows: list[dict[str, Any]]
    prompts: list[Prompt]
    report: LoadReport
    is_cut: bool
    num_rows: int | None


class TakenRows(RowStream):
    """The first rows of a stream, read once.

    Args:
        stream: to read from.
        limit: of the rows; none: all.
    """

    def __init__(self, stream: RowStream, limit: int | None) -> None:
        # They are kept, so every kind of run can read them.
        super().__init__(stream.source.model_copy(update={"streaming": False}))
        rows = iter(stream)
        self.taken = list(islice(rows, limit))
        self.is_cut = limit is not None and next(rows, None) is not None
        self.label, self.notes, self.known = stream.label, stream.notes, stream.num_rows

    @property
    @override
    def num_rows(self) -> int:
        return len(self.taken)

    @override
    def rows_from(self, start: int) -> Iterator[PlacedRow]:
        return iter(self.taken[start:])


def read_facts(
    kind: str, setting: SourceSetting, config: RunConfig, split: Split, *, limit: int | None
) -> DataFacts:
    """Read a data set as a run of this kind does; rows that it cannot use are reported.

    Args:
        kind: key of `KINDS`.
        setting: value of `data.train` or `data.test`.
        config: of a run of this kind.
        split: for which setting.
        limit: rows that are read of each source; none: all.

    Raises:
        ValueError: the source cannot be read, or has no usable row.
    """
    taken = [TakenRows(stream, limit) for stream in streams_of(setting, split)]
    data = config.data.model_copy(update={"on_malformed": "skip"})
    more = {"rewards": config.rewards} if isinstance(config, TrainerConfig) else {}
    prompts, report = KINDS[kind][1](taken, data, split=split, **more)
    rows = [row for stream in taken for _, raw in stream.taken if (row := _parsed(raw)) is not None]
    is_cut = any(stream.is_cut for stream in taken)
    counts = [stream.known if stream.is_cut else len(stream.taken) for stream in taken]
    known = None if None in counts else sum(count or 0 for count in counts)
    return DataFacts(kind, config.data, rows, prompts, report, is_cut, known)


def _parsed(raw: Any) -> dict[str, Any] | None:
    try:
        return as_row(raw)
    except MalformedRow:
        return None


def layouts_of(facts: DataFacts) -> Counter[str]:
    """Number of rows of each layout, by the columns that prompt and answer come from."""
    return Counter(filter(None, (_layout(row, facts) for row in facts.rows)))


def _layout(row: Mapping[str, Any], facts: DataFacts) -> str | None:
    config = facts.config
    if facts.kind in ("pairs", "reward-model"):
        names = [name for name in (config.prompt_key, "chosen", "rejected") if name in row]
        return ", ".join(names)
    try:
        prompt = prompt_column(row, config)
    except MalformedRow:
        return None
    kind = "text" if isinstance(row.get(prompt), str) else "chat"
    prompt = f"{prompt} ({_LAYOUTS.get(prompt, kind)})"
    verl = row.get("reward_model")
    found = [name for name in (config.answer_key, *ANSWER_COLUMNS) if row.get(name) is not None]
    if found:
        return f"{prompt}, {found[0]}"
    if isinstance(verl, dict | str):
        return f"{prompt}, reward_model.ground_truth (verl)"
    chat = prompt.split()[0] in CHAT_COLUMNS
    return f"{prompt}, its last answer" if chat else f"{prompt}, no answer"


@dataclass
class ColumnFacts:
    """One column: how often each type is in it, how many cells are empty, and a value of it."""

    types: Counter[str] = field(default_factory=Counter)
    empty: int = 0
    example: Any = None


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, ColumnFacts]:
    """Facts of each column, in the order in which they appear; a cell that is not there is empty."""
    columns: dict[str, ColumnFacts] = {name: ColumnFacts() for row in rows for name in row}
    for row in rows:
        for name, column in columns.items():
            value = row.get(name)
            if value is None or value == "" or value == [] or value == {}:
                column.empty += 1
                continue
            column.types[_type_name(value)] += 1
            column.example = value if column.example is None else column.example
    return columns


def _type_name(value: Any) -> str:
    if (
        isinstance(value, list)
        and value
        and isinstance(value[0], dict)
        and {"role", "from"} & value[0].keys()
    ):
        return "messages"
    return {"str": "text"}.get(type(value).__name__, type(value).__name__)


@dataclass
class Encoded:
    """Tokens of the usable rows.

    Attributes:
        lengths: tokens of each part (prompt, answer, row, chosen, rejected) of each row.
        samples: parts of the first rows as texts with special tokens.
        refused: reasons of the chat template for rows that it does not take.
        ids: prompt of each row.
    """

    lengths: dict[str, list[int]] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)


def encode(facts: DataFacts, codec: TextCodec, *, num_samples: int) -> Encoded:
    """Tokens of every row, as the model reads it."""
    encoded = Encoded()
    for prompt in facts.prompts:
        try:
            parts = _parts(prompt, facts, codec)
        except ValueError as error:
            encoded.refused.append(str(error))
            continue
        encoded.ids.append(parts["prompt"])
        whole = {**parts, "row": [i for ids in parts.values() for i in ids]} if "answer" in parts else parts
        for name, ids in whole.items():
            encoded.lengths.setdefault(name, []).append(len(ids))
        if len(encoded.samples) < num_samples:
            encoded.samples.append({name: codec.decode_all(ids) for name, ids in parts.items()})
    return encoded


def _parts(prompt: Prompt, facts: DataFacts, codec: TextCodec) -> dict[str, list[int]]:
    if isinstance(prompt.answer, Pair):
        chosen, rejected = (answer_row(codec, prompt, answer) for answer in prompt.answer)
        answers = {"chosen": chosen.response_ids, "rejected": rejected.response_ids}
        return {"prompt": chosen.prompt_ids, **answers}
    if isinstance(facts.config, AnswersDataConfig):
        row = answer_row(codec, prompt, prompt.answer)
        return {"prompt": row.prompt_ids, "answer": row.response_ids}
    return {"prompt": codec.encode_prompt(prompt)}


def plain_samples(facts: DataFacts, num_samples: int) -> list[dict[str, str]]:
    """Parts of the first rows as texts, where there is no tokenizer."""
    samples = []
    for prompt in facts.prompts[:num_samples]:
        sample = {"prompt": text_of(prompt.content)}
        if isinstance(prompt.answer, Pair):
            sample |= {name: text_of(value) for name, value in prompt.answer._asdict().items()}
        elif isinstance(facts.config, AnswersDataConfig) and isinstance(prompt.answer, str):
            sample["answer"] = prompt.answer
        samples.append(sample)
    return samples


def text_of(content: Any) -> str:
    """Text of a prompt or answer: messages as `role: content`."""
    if not isinstance(content, list):
        return str(content)
    return "\n".join(f"{message['role']}: {message['content']}" for message in content)


def spread(lengths: Sequence[int], limit: int | None) -> dict[str, float]:
    """Least, median, 95th percentile and most of some lengths, and how many are over a limit."""
    ordered = sorted(lengths)
    facts = {
        "min": ordered[0],
        "median": median(ordered),
        "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
        "max": ordered[-1],
    }
    return facts if limit is None else {**facts, "over": sum(length > limit for length in ordered)}
