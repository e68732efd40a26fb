"""Tests of the model that comes from a package index, with an index of one tiny wheel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.cli.tiny_gguf import MEMBER, write_wheel
from verl.cli import packaged_model
from verl.cli.packaged_model import PackagedModel, cache_folder, checksum, fetch_model
from verl.utils.sampling_types import Prompt
from verl.utils.tokens import TextCodec


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return write_wheel(tmp_path_factory.mktemp("index"))


@pytest.fixture
def model(index, monkeypatch) -> PackagedModel:
    """The model of the index; pip asks for nothing else."""
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index.parent)}.items():
        monkeypatch.setenv(name, value)
    return PackagedModel(
        name="tiny",
        title="Tiny-Chat",
        package="tiny-chat==1.0",
        sha256=checksum(index),
        member=MEMBER,
        end_tokens=("<|im_end|>", "<|endoftext|>"),
        context_tokens=128,
        disk_bytes=10_000_000,
        license_note="Apache License 2.0\n",
        digits_apart=True,
    )


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_wheel_becomes_a_folder_with_everything_that_training_needs_once(model, tmp_path):
    said: list[str] = []
    folder = fetch_model(model, said.append, tmp_path)
    assert folder == tmp_path / "models" / "Tiny-Chat" and len(said) == 2
    assert names(folder.parent) == ["Tiny-Chat", "tiny.lock"]
    assert fetch_model(model, said.append, tmp_path) == folder and len(said) == 2

    codec = TextCodec.load(str(folder))
    assert codec.stop_ids == (2, 0) and codec.tokenizer.pad_token_id == 2
    chat = Prompt([{"role": "user", "content": "1  23"}])
    assert codec.prompt_text(chat).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert codec.tokenizer.tokenize("1  23") == ["1", "ĠĠ", "2", "3"]
    read = AutoModelForCausalLM.from_pretrained(folder)
    assert read.dtype == torch.float32 and read.lm_head.weight is read.model.embed_tokens.weight
    # Tied weights are written once.
    weights = folder / "model.safetensors"
    assert weights.stat().st_size < 4 * sum(p.numel() for p in read.parameters()) + 4096
    assert weights.stat().st_mode & 0o077 == (folder / "config.json").stat().st_mode & 0o077
    assert "Apache" in (folder / "LICENSE.txt").read_text()


def test_a_damaged_folder_stays_until_another_one_is_there(model, tmp_path, monkeypatch):
    file = fetch_model(model, lambda line: None, tmp_path) / "config.json"
    file.write_text("{}")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    said: list[str] = []
    with pytest.raises(RuntimeError, match="need a connection to a package index"):
        fetch_model(model, said.append, tmp_path)
    assert said[0].endswith("is made again: config.json was changed") and file.read_text() == "{}"


@pytest.mark.parametrize("name", ["model.safetensors", "files.json", "chat_template.jinja"])
def test_a_damaged_folder_is_noticed_and_made_again(model, tmp_path, name):
    said: list[str] = []
    file = fetch_model(model, said.append, tmp_path) / name
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    fetch_model(model, said.append, tmp_path)
    assert file.read_bytes() == content and "is made again" in said[2] and len(said) == 5
    file.unlink()
    assert fetch_model(model, said.append, tmp_path) and file.exists()


def test_another_file_of_the_same_name_is_not_used(model, tmp_path):
    with pytest.raises(RuntimeError, match="need the file of tiny-chat==1.0 with the SHA-256 beef"):
        fetch_model(replace(model, sha256="beef"), print, tmp_path)
    assert names(tmp_path / "models") == ["tiny.lock"]


def test_an_interruption_leaves_nothing_and_what_a_kill_left_is_removed(model, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    killed = tmp_path / "models" / ".tiny-killed" / "model"
    killed.mkdir(parents=True)
    with monkeypatch.context() as during, pytest.raises(KeyboardInterrupt):
        during.setattr(packaged_model, "check_parts", interrupted)
        fetch_model(model, print, tmp_path)
    assert names(tmp_path / "models") == ["tiny.lock"]
    assert fetch_model(model, print, tmp_path).is_dir()


def test_without_an_index_the_message_says_how_to_bring_the_file(model, tmp_path, monkeypatch):
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(RuntimeError, match=r"No matching distribution(.|\n)*PIP_FIND_LINKS=FOLDER"):
        fetch_model(replace(model, package="tiny-chat==2.0"), print, tmp_path)


def test_without_pip_or_gguf_the_message_names_what_to_install(model, tmp_path, monkeypatch):
    with monkeypatch.context() as without:
        program = tmp_path / "python"
        program.write_text("#!/bin/sh\necho 'python: No module named pip' >&2\nexit 1\n")
        program.chmod(0o755)
        without.setattr("sys.executable", str(program))
        with pytest.raises(RuntimeError, match="need pip to download tiny-chat==1.0: .* -m ensurepip"):
            fetch_model(model, print, tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package gguf.*verl\[tiny,reasoning-gym\]"):
        fetch_model(model, print, tmp_path)


def test_a_full_disk_and_a_file_without_a_template_are_said(model, tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="need 1000000000000000 MB for Tiny-Chat"):
        fetch_model(replace(model, disk_bytes=10**21), print, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    wheel = write_wheel(other, template="")
    monkeypatch.setenv("PIP_FIND_LINKS", str(other))
    with pytest.raises(RuntimeError, match=r"need a chat template in tiny-chat==1\.0"):
        fetch_model(replace(model, sha256=checksum(wheel)), print, tmp_path)


def test_the_cache_is_where_the_user_wants_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("VERL_CACHE", raising=False)
    assert cache_folder() == tmp_path / "verl"
    monkeypatch.setenv("VERL_CACHE", "~/own")
    assert cache_folder().name == "own" and cache_folder().is_absolute()


def test_a_cache_that_cannot_be_written_is_said_with_the_way_out(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cache folder that can be written.*set VERL_CACHE"):
        fetch_model(model, print, tmp_path / "file")
