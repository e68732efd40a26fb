"""One step of training with a function as the agent, and a tiny model."""

from __future__ import annotations

import io

from rich.console import Console

from tests.tiny import tiny_transformer
from verl import Trainer
from verl.config import load_config
from verl.utils.tokens import character_tokenizer


async def solve(task, client):
    """Two turns, of which the second continues the first."""
    messages = [{"role": "user", "content": task["prompt"][-1]["content"]}]
    for _ in range(2):
        response = await client.chat.completions.create(model="policy", messages=messages)
        content = response.choices[0].message.content
        messages += [{"role": "assistant", "content": content}, {"role": "user", "content": "?"}]
    return {"reward": float(len(content)), "seen": task["answer"]}


def test_a_step_learns_from_the_episodes_of_a_program(tmp_path):
    folder = tmp_path / "model"
    tiny_transformer().save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": [{"role": "user", "content": "hi"}], "answer": 5}\n')
    settings = [
        f"policy.path={folder}",
        f"data.train={data}",
        f"output_dir={tmp_path / 'run'}",
        "sampling.max_tokens=6",
        "agent.max_processes=2",
        "prompts_per_step=1",
        "samples_per_prompt=2",
        "steps=1",
    ]
    trainer = Trainer(load_config("grpo", settings), program=solve, console=Console(file=io.StringIO()))
    try:
        trainer.load_train_data()
        metrics = trainer.step()
    finally:
        trainer.close()
    assert metrics["episode/turns"] == 2 and metrics["episode/segments"] >= 1
