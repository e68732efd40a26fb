"""Runs on chats: settings of the chat template, the tokens of the tokenizer and the rows of the model."""

from __future__ import annotations

import io
import json
import shutil

import pytest
from rich.console import Console

from tests.training import toy_config, write_prompts
from verl.config import load_sft_config
from verl.trainer.rl_trainer import Trainer
from verl.trainer.sft import SFTTrainer
from verl.utils.sampling_types import Prompt
from verl.utils.tokens import TextCodec

CHAT = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "cab"}]
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}={{ m.content }}<unk>=\n{% endfor %}"
    "{% if add_generation_prompt %}a={% endif %}"
)


def sft(model, folder, *overrides):
    paths = [f"policy.path={model}", f"output_dir={folder / 'run'}", "device=cpu", "tracking.sinks=[jsonl]"]
    rows = write_prompts(folder / "rows.jsonl")
    return SFTTrainer(
        load_sft_config({"steps": 1}, [*paths, f"data.train={rows}", "rows_per_step=1", *overrides]),
        console=Console(file=io.StringIO()),
    )


@pytest.mark.parametrize("kind", ["sft", "rl"])
def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused_at_the_start(kind, letters, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(letters, model)
    tokenizer = TextCodec.load(str(model)).tokenizer
    tokenizer.add_tokens(["<think>", "</think>", "<call>", "</call>"])
    tokenizer.save_pretrained(model)
    with pytest.raises(
        ValueError, match="has 17 ids, but the model's embedding 16 rows, so that </call> have"
    ):
        sft(model, tmp_path) if kind == "sft" else Trainer(toy_config("grpo", model, tmp_path))
    assert not (tmp_path / "run").exists()


def test_settings_of_chats_are_refused_where_all_prompts_are_texts(letters, tmp_path):
    with pytest.raises(ValueError, match="data.system_prompt has no effect, as no chat template is applied"):
        sft(letters, tmp_path, "data.system_prompt=abc")


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_prompts_that_the_template_does_not_take_stop_the_start_or_are_skipped(policy, letters, tmp_path):
    picture = {"role": "user", "content": [{"type": "image", "image": "a.png"}]}
    rows = [{"prompt": CHAT[:1], "answer": "cab"}, {"prompt": [picture], "answer": "cab"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    files = [f"data.train={tmp_path / 'rows.jsonl'}", f"data.chat_template={tmp_path / 'chat.jinja'}"]
    config = toy_config("grpo", letters, tmp_path, *files, f"data.on_malformed={policy}")
    if policy == "stop":
        with pytest.raises(ValueError, match="(?s)1 of 2 rows.*prompt 1 of rows: message 1 has a part"):
            Trainer(config).load_train_data()
    else:
        trainer = Trainer(config)
        report = trainer.load_train_data()
        assert len(trainer.loader.prompts) == 1 and (report.num_rows, report.num_malformed) == (2, 1)


def test_the_answer_to_messages_is_what_the_chat_template_writes(letters, tmp_path):
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    files = [f"data.train={tmp_path / 'chat.jsonl'}", f"data.chat_template={tmp_path / 'chat.jinja'}"]
    trainer = sft(letters, tmp_path, *files)
    trainer.fit()
    codec = trainer.codec
    assert codec.tokenizer.decode(codec.encode_answer("cab", Prompt(CHAT[:1]))) == "cab<unk>"
    assert codec.stop_ids == (1, 3)
    assert TextCodec.load(str(tmp_path / "run" / "model")).tokenizer.chat_template == TEMPLATE


def test_rows_of_the_head_that_are_no_tokens_are_not_sampled_and_count_for_nothing(letters, tmp_path):
    settings = ["sampling.temperature=3", "algorithm.correction=recompute"]
    trainer = Trainer(toy_config("grpo", letters, tmp_path, *settings))
    assert trainer.codec.num_ids == 13 and trainer.groups.model_config.vocab_size == 16
    data = trainer.collect_data([Prompt("abc=", "abc")] * 4)
    assert max(token for t in data.trajectories for token in t.response_ids) == 12
    metrics = trainer.update_policy(data)
    differences = [value for name, value in metrics.items() if name.startswith("mismatch/k")]
    assert differences and max(map(abs, differences)) < 1e-6
