"""Settings of the data of a run: prompts, pairs of answers, and reward functions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from verl.config.fields import Choice, Options, PathText, Section, TemplateText, setting


class WeightedChoice(Choice):
    """A reward function with its weight in the sum."""

    weight: float = 1.0


class DataSource(BaseModel):
    """One source of rows, by its path alone or with more about it: `{path: rows.jsonl, weight: 2}`.

    Attributes:
        path: file, folder or glob of files, saved `datasets` folder, task:NAME, environment (rows of
            `agent.environment`), or a data set of the Hugging Face hub as OWNER/NAME or OWNER/NAME:CONFIG.
        name: of the source in metrics, and `data_source` of rows that have no such column; none: of its path.
        weight: its share of the prompts of a run, relative to the other sources; none: by its rows.
        split: of a data set of the hub or a saved one, such as train[:10%]; none: train or test, as the
            setting says.
        revision: of a data set of the hub: a branch, a tag or a commit.
        streaming: read a data set of the hub while the run goes on, and never all of it.
        options: of a task or environment that has some, such as {max_terms: 3}.
        reward: function that rewards its rows, in place of `rewards.functions`.
        sampling: sampling parameters of its rows, over `sampling` and `evaluation`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    path: PathText
    name: str | None = None
    weight: Annotated[float, Field(gt=0)] | None = None
    split: str | None = None
    revision: str | None = None
    streaming: bool = False
    options: Options = Options()
    reward: WeightedChoice | None = None
    sampling: Options = Options()

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class DataConfig(Section):
    """Files and columns of the prompts."""

    train: PathText | DataSource | tuple[PathText | DataSource, ...] | None = setting(
        None,
        "JSON, JSONL, CSV, TSV, Parquet or Arrow file, folder or glob of such files, saved `datasets` "
        "folder, OWNER/NAME[:CONFIG] of the hub, task:NAME, environment (rows of the environment of the "
        "episodes), or memory (rows of a program); or {path, weight, ...}; or a list of them.",
    )
    test: PathText | DataSource | tuple[PathText | DataSource, ...] | None = setting(
        None, "The same for evaluation; task:NAME stands for the held-out prompts of that task."
    )
    prompt_key: str = setting(
        "prompt",
        "Column with the prompt: text or chat messages. Rows without a column prompt may have another public "
        "layout; any other name is taken literally.",
    )
    answer_key: str = setting(
        "answer", "Column with the reference answer: the rewards read it, and fine-tuning learns it."
    )
    sampling_key: str | None = setting(
        None,
        "Column with sampling parameters of the row, over `sampling` and `evaluation`: a mapping of "
        "temperature, top_p, top_k, min_p, max_tokens, stop, repetition_penalty.",
    )
    system_prompt: str | None = setting(None, "Put before chat prompts that have no system message.")
    chat_template: TemplateText | None = setting(
        None,
        "Chat template in place of the tokenizer's own: one of ours by name, such as qwen3, a file with "
        "Jinja, or its text.",
    )
    chat_template_kwargs: Options = setting(
        Options(),
        "Variables of the chat template, such as enable_thinking; a row's column chat_template_kwargs goes "
        "over them.",
    )
    tools: PathText | None = setting(
        None,
        "Tools offered in chats whose row has none: a JSON file with a list of schemas, or "
        '"package.module:name" or "file.py:name" of Python functions.',
    )
    max_prompt_tokens: int = setting(1024, "Longer prompts are dropped and counted.", unit="tokens", ge=1)
    on_malformed: Literal["stop", "skip"] = setting(
        "stop", "A row that cannot be read stops the run at its start, or is skipped and counted."
    )
    shuffle: bool = setting(True, "Draw prompts in a seeded random order, a new one in each epoch.")
    curriculum: Choice = setting(
        Choice(name="off"),
        "Order by difficulty: pass_rate (prompts that are answered sometimes), easy_to_hard, or a sampler of "
        'yours, "file.py:Class".',
    )
    shuffle_buffer: int = setting(
        1000, "Rows of a stream that are kept, and drawn from in random order.", unit="rows", ge=1
    )
    in_memory_mb: float = setting(
        256.0, "Training prompts of more than this size are kept in a private file.", unit="MB", ge=0
    )


class AnswersDataConfig(DataConfig):
    """Files and columns of data whose answers are learned."""

    max_sequence_tokens: int | None = setting(
        None,
        "Longest prompt with answer; none: the model's context. Conversations lose whole turns at their end, "
        "and what is still longer is dropped and counted.",
        unit="tokens",
        ge=1,
    )


class SFTDataConfig(AnswersDataConfig):
    """Files and columns of the examples of fine-tuning."""

    train_on: Literal["all", "last"] = setting(
        "all",
        "Answers of the assistant in a conversation that are learned; a message's own weight (0, 1) or train "
        "(true, false) overrides it.",
    )
    min_reward: float | None = setting(
        None,
        "Learn the rows alone whose column `reward`, which recorded episodes have, is at least this; none: "
        "all rows.",
    )


class PairsDataConfig(AnswersDataConfig):
    """Files and columns of the pairs of answers."""

    chosen_key: str = setting("chosen", "Column with the better answer of a pair.")
    rejected_key: str = setting("rejected", "Column with the worse answer of a pair.")


class RewardsConfig(Section):
    """The reward of an answer, a weighted sum of functions."""

    functions: tuple[WeightedChoice, ...] = setting(
        (), 'Functions by name, or as "package.module:function" or "path/file.py:function".'
    )
    column: str | None = setting(
        None,
        "Column with the function that rewards the row, by name or as {name, options}, in place of "
        "`functions`; a row without one has that of its source, else `functions`.",
    )
    timeout_s: float = setting(30.0, "Time limit of one call.", unit="s", gt=0)
    max_failed_share: float = setting(
        0.5, "Share of a step's answers without a reward above which the run stops.", ge=0, le=1
    )
    isolation: Literal["process", "thread"] = setting(
        "process", "Run functions in worker processes, which can be ended, or on threads of the trainer."
    )
