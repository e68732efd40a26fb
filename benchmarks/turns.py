"""Characters and seconds of rendering a long episode turn by turn, against its whole history each turn."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from verl.utils.chat.chat_template import ChatTemplate
from verl.utils.chat.template_files import fitting_templates, read_template
from verl.utils.chat.turn_rendering import ChatRenderer
from verl.utils.sampling_types import Prompt
from verl.utils.tokens import TextCodec, load_tokenizer

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
    },
}
QUESTION = {"role": "user", "content": "Add all numbers of the list, two at a time."}


def turn(number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A call and its result."""
    function = {"name": "add", "arguments": {"a": number, "b": number}}
    call = {"id": f"call{number:05}", "type": "function", "function": function}
    result = {
        "role": "tool",
        "name": "add",
        "tool_call_id": call["id"],
        "content": f"The sum is {2 * number}.",
    }
    return {"role": "assistant", "content": "Next.", "tool_calls": [call]}, result


class Counted(ChatTemplate):
    """A chat template that counts the characters it writes."""

    num_characters = 0

    def render(self, chat, *, opens_answer=False):
        text = super().render(chat, opens_answer=opens_answer)
        self.num_characters += len(text)
        return text


def measured(template: Counted, step: Callable[[int], None], turns: int) -> list[tuple[int, float]]:
    """Characters and seconds of each turn."""
    figures = []
    for number in range(turns):
        before, begun_s = template.num_characters, time.perf_counter()
        step(number)
        figures.append((template.num_characters - before, time.perf_counter() - begun_s))
    return figures


def episode(model: str, name: str, turns: int) -> dict[str, Any]:
    """Figures of one template, both ways."""
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = read_template(name)
    codec = TextCodec(tokenizer)
    codec.template = Counted(tokenizer)
    prompt = Prompt([QUESTION], tools=(TOOL,))
    renderer = ChatRenderer(codec, prompt, [TOOL])
    renderer.start([QUESTION])
    sampled = codec.encode("Next." + codec.template.end)
    history = [QUESTION]

    def follow(number: int) -> None:
        called, result = turn(number)
        renderer.follow(called, [result], sampled=sampled)

    def whole(number: int) -> None:
        history.extend(turn(number))
        codec.encode(codec.template.render(codec.chat(Prompt(history, tools=(TOOL,))), opens_answer=True))

    follow(0)  # compiles the template
    new, old = (measured(codec.template, step, turns) for step in (follow, whole))
    return {
        "template": name,
        "turns": turns,
        "characters_first": new[0][0],
        "characters_last": new[-1][0],
        "seconds": sum(s for _, s in new),
        "history_characters_first": old[0][0],
        "history_characters_last": old[-1][0],
        "history_seconds": sum(s for _, s in old),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "model", help="folder or hub name of a model; the templates that fit its tokenizer are run"
    )
    parser.add_argument("--turns", type=int, default=128)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = fitting_templates(load_tokenizer(options.model))
    figures = [episode(options.model, name, options.turns) for name in names]
    for f in figures:
        print(
            f"{f['template']:14} {f['turns']} turns: {f['characters_first']} to {f['characters_last']} "
            f"characters per turn, {f['seconds']:.2f} s; whole history: {f['history_characters_first']} to "
            f"{f['history_characters_last']} characters, {f['history_seconds']:.2f} s"
        )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
