"""An engine that answers with given texts, and environments of a few lines, for tests of episodes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from tests.chat_templates import chat_tokenizer
from verl.agents.environments.session import (
    Environments,
    EnvironmentSession,
    EpisodeStart,
    Message,
    Reward,
    StepResult,
    ToolResult,
)
from verl.agents.episodes.driver import EpisodeDriver, ToolLoop
from verl.agents.episodes.runner import EpisodeRunner
from verl.config.agent import AgentConfig
from verl.data.trajectory import Trajectory
from verl.utils.sampling_types import Completion, FinishReason, PrefixAffinity, Prompt, SamplingParams
from verl.utils.tokens import TextCodec
from verl.utils.tool_calls.calls import ToolCall

# Calls between tags, as Hermes writes them; tools in a system message.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }};{% endfor %}<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Sum.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
    },
}
CALL = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'


def chat_codec() -> TextCodec:
    return TextCodec(chat_tokenizer(TEMPLATE))


class ScriptedEngine:
    """Answers the i-th request of an episode with its i-th text, and notes all requests.

    A text that ends with "..." is cut at the length limit there; others are closed.
    """

    def __init__(
        self, codec: TextCodec, texts: Sequence[str] | Callable[[str], str], version: int = 0
    ) -> None:
        self.codec, self.texts, self.version = codec, texts, version
        self.requests: list[tuple[list[int], SamplingParams]] = []

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, affinity: PrefixAffinity | None = None
    ) -> Completion:
        await asyncio.sleep(0)
        turn = params.sample_index >> 40
        self.requests.append((list(prompt_ids), params))
        read = self.codec.decode_all(prompt_ids)
        text = self.texts(read) if callable(self.texts) else self.texts[turn]
        finish: FinishReason = "length" if text.endswith("...") else "stop"
        ids = self.codec.encode(text.removesuffix("..."))
        ids += list(self.codec.closing_ids) if finish == "stop" else []
        if len(ids) > params.max_tokens:
            ids, finish = ids[: params.max_tokens], "length"
        return Completion(ids, [-0.25] * len(ids), finish, version=turn)


class AddTools(Environments):
    """The tool `add`, in a session for each episode; keeps the sessions."""

    def __init__(self, make: Callable[[EpisodeStart], EnvironmentSession] | None = None) -> None:
        self.make = make or AddSession
        self.sessions: list[EnvironmentSession] = []

    async def open(self, start: EpisodeStart) -> EnvironmentSession:
        self.sessions.append(self.make(start))
        return self.sessions[-1]


class AddSession(EnvironmentSession):
    schemas = (ADD,)

    def __init__(self, start: EpisodeStart) -> None:
        self.start, self.num_closed = start, 0

    async def call(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        return [
            ToolResult(f"{c.arguments['a'] + c.arguments['b']:g}")
            if c.name == "add"
            else ToolResult(f"there is no tool {c.name}", "unknown_tool")
            for c in calls
        ]

    async def close(self) -> None:
        self.num_closed += 1


class Dialogue(AddSession):
    """Says the given texts one after the other to turns without calls; a reward of 1 for each turn."""

    steps = True

    def __init__(self, start: EpisodeStart, says: Sequence[str] = ("more",)) -> None:
        super().__init__(start)
        self.says = list(says)

    async def step(self, message: Message) -> StepResult:
        self.is_over = not self.says
        said = [{"role": "user", "content": self.says.pop(0)}] if self.says else []
        return StepResult(said, reward=1.0)

    async def reward(self) -> Reward | None:
        return {"reward": 0.5, "won": 1.0}


def play(
    texts: Sequence[str] | Callable[[str], str],
    environments: Environments | None = None,
    *,
    samples: int = 1,
    driver: EpisodeDriver | None = None,
    turn_tokens: int = 200,
    context: int | None = None,
    **settings,
) -> tuple[list[Trajectory], ScriptedEngine]:
    """Episodes of one prompt with a scripted policy."""
    codec = chat_codec()
    engine = ScriptedEngine(codec, texts)
    driver = driver or ToolLoop(environments or AddTools())
    config = AgentConfig.model_validate(settings)
    runner = EpisodeRunner(engine, codec, config, driver=driver, context=context)
    prompt = Prompt([{"role": "user", "content": "2+3?"}])
    group = runner.run_group(prompt, SamplingParams(n=samples, max_tokens=turn_tokens, seed=7))
    return asyncio.run(group), engine
