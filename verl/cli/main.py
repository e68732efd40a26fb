"""The command line: training, evaluation, serving, what runs and their engines do, plans, settings, small
models and data.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from verl import __version__
from verl.config.layers import RECIPES
from verl.config.loader import load_config, load_run, to_yaml
from verl.config.reference import describe_settings
from verl.config.run import PreferenceConfig, RewardModelConfig, RunConfig, SFTConfig

# Loaded only by the commands that need them: `verl config` and `--help` answer at once.
_COMMANDS_WITH_MODELS = "verl.cli.commands"
_SERVER = "verl.rollout.server.app"
_PLANS = "verl.planner.reshard_report"
_REPORTS = "verl.monitoring.reports"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; exit code 0, 1 if the run failed or is found not to be well, 2 if what was given
    cannot be used.
    """
    args = _parser().parse_args(argv)
    # As with `python -m`: "my_module:function" in the settings is found in the folder where the command runs.
    sys.path.insert(0, "")
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        print(
            "interrupted; started again, a run goes on from its newest checkpoint, or anew without one",
            file=sys.stderr,
        )
        return 130
    except Exception as error:  # the process border: one clear message, the stack on request
        if args.debug:
            traceback.print_exc()
        given = isinstance(error, ValueError | FileNotFoundError)
        shown = (
            str(error) if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: {error}"
        )
        print(f"verl: {shown}" + ("" if given or args.debug else "\n(--debug shows where)"), file=sys.stderr)
        return 2 if given else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="verl", description="Reinforcement-learning post-training of language models."
    )
    parser.add_argument("--version", action="version", version=f"verl {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    recipe = f"a recipe ({', '.join(RECIPES)}) or a YAML file"

    train = _command(commands, "train", _train, "train a policy on rewards")
    train.add_argument("recipe", metavar="RECIPE_OR_YAML", help=recipe)
    _overridable(train)
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="check settings, data, rewards and model, print the configuration, and stop",
    )

    _from_data(commands, "sft", SFTConfig, "fine-tune a model on reference answers")
    _from_data(
        commands, "preference", PreferenceConfig, "train a policy on pairs of a better and a worse answer"
    )
    _from_data(commands, "reward-model", RewardModelConfig, "train a reward model on such pairs")

    evaluate = _command(commands, "eval", _eval, "measure a policy on held-out prompts")
    evaluate.add_argument("recipe", metavar="RECIPE_OR_YAML", help=recipe)
    _overridable(evaluate)

    export = _command(
        commands, "export", _with_models("export"), "write the policy of a checkpoint as a Hugging Face model"
    )
    export.add_argument("checkpoint", help="a folder step-... of a run")
    export.add_argument("folder", help="where to")

    _about_engines(commands)
    _about_runs(commands)
    _about_plans(commands)

    config = _command(
        commands, "config", _config, "show the settings, each with its default, unit and source"
    )
    config.add_argument("key", nargs="?", default="", help="a key or the start of one, such as algorithm.kl")
    config.add_argument("--recipe", default=None, help=f"show the values of {recipe}")

    quickstart = _command(
        commands, "quickstart", _with_models("quickstart"), "watch a small model learn two-digit addition"
    )
    quickstart.add_argument("--seed", type=int, default=0, help="of everything random (0)")
    quickstart.add_argument("--algo", choices=("grpo", "ppo"), default="grpo", help="algorithm (grpo)")
    quickstart.add_argument("--output", default="outputs/quickstart", help="folder (outputs/quickstart)")

    model = _command(
        commands,
        "make-model",
        _with_models("make_model"),
        "write a small random model with a character tokenizer",
    )
    model.add_argument("folder", help="where to")
    model.add_argument("--hidden", type=int, default=64, help="width, a multiple of 32 (64)")
    model.add_argument("--layers", type=int, default=2, help="depth (2)")
    model.add_argument("--seed", type=int, default=0, help="of the weights (0)")
    model.add_argument("--characters", default=None, help="of its vocabulary (printable ASCII and newline)")

    data = _command(commands, "make-data", _with_models("make_data"), "write one of our tasks as a data set")
    data.add_argument("task", help="copy-8, sort-6, add-2, reverse-8 or digits")
    data.add_argument("path", help="a .jsonl file")
    data.add_argument("--split", choices=("train", "test"), default="train", help="(train)")
    data.add_argument("--seed", type=int, default=0, help="of the training prompts (0)")
    data.add_argument("--pairs", action="store_true", help="write pairs: the right answer and a near miss")
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int | None], meaning: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=meaning, description=meaning[0].upper() + meaning[1:] + ".")
    parser.add_argument("--debug", action="store_true", help="show the whole stack of an error")
    parser.set_defaults(run=run)
    return parser


def _about_engines(commands: Any) -> None:
    serve = _command(commands, "serve", _serve, "answer requests in OpenAI's format with a model")
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

    engines = _command(
        commands, "engines", _with_models("engines"), "list, add or remove the engines of a run that works"
    )
    engines.add_argument("action", choices=("list", "add", "remove"))
    engines.add_argument("run_folder", metavar="OUTPUT_DIR", help="of the run")
    engines.add_argument("name", nargs="?", help="of the engine; for add one of your choice")
    engines.add_argument(
        "--address", default=None, help="of a server that runs already, to add; without, the run starts one"
    )


def _about_runs(commands: Any) -> None:
    ledger = _command(
        commands, "ledger", _report("ledger"), "say what became of every prompt that a run has sent out"
    )
    ledger.add_argument("run_folder", metavar="OUTPUT_DIR", help="of the run, which may be at work")
    ledger.add_argument("--group", type=int, default=None, metavar="N", help="of this group alone")

    doctor = _command(
        commands, "doctor", _report("doctor"), "say what a run waits for and why, or how it ended"
    )
    doctor.add_argument("run_folder", metavar="OUTPUT_DIR", help="of the run")


def _about_plans(commands: Any) -> None:
    meaning = "say what something will cost, without a device"
    kinds = commands.add_parser("plan", help=meaning, description=f"{meaning[0].upper()}{meaning[1:]}.")
    plans = kinds.add_subparsers(title="plans", metavar="PLAN", required=True)

    reshard = _command(
        plans, "reshard", _reshard, "bytes, memory and messages of the change from training to generation"
    )
    reshard.add_argument(
        "--model", required=True, help="a folder, a config.json, or llama-7b, llama-13b, llama-34b, llama-70b"
    )
    sizes = "tensor=, pipeline=, data=, fsdp=, sequence=, experts=; with fsdp as FSDP2 shards, without as Megatron"
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


def _from_data(commands: Any, name: str, kind: type[RunConfig], meaning: str) -> None:
    """A command that trains on what data says, without a recipe."""

    def run(args: argparse.Namespace) -> None:
        # A first argument with "=" is an override: the YAML file was left out.
        is_override = args.recipe is not None and "=" in args.recipe and not Path(args.recipe).exists()
        overrides = [args.recipe, *args.overrides] if is_override else args.overrides
        config = load_run(kind, None if is_override else args.recipe, overrides)
        importlib.import_module(_COMMANDS_WITH_MODELS).fit(config, dry_run=args.dry_run)

    parser = _command(commands, name, run, meaning)
    parser.add_argument("recipe", metavar="YAML", nargs="?", help="a YAML file; none: the defaults")
    _overridable(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check settings, data and model, print the configuration, and stop",
    )


def _overridable(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings, such as policy.optimizer.lr=1e-4 (verl config lists all)",
    )


def _with_models(name: str) -> Callable[[argparse.Namespace], None]:
    """A command that loads PyTorch, looked up when it runs."""
    return lambda args: getattr(importlib.import_module(_COMMANDS_WITH_MODELS), name)(args)


def _report(name: str) -> Callable[[argparse.Namespace], int]:
    """A command that reads what a run has written; returns the exit code."""
    return lambda args: getattr(importlib.import_module(_REPORTS), name)(args)


def _train(args: argparse.Namespace) -> None:
    config = load_config(args.recipe, args.overrides)
    importlib.import_module(_COMMANDS_WITH_MODELS).fit(config, dry_run=args.dry_run)


def _eval(args: argparse.Namespace) -> None:
    importlib.import_module(_COMMANDS_WITH_MODELS).evaluate(load_config(args.recipe, args.overrides))


def _reshard(args: argparse.Namespace) -> None:
    importlib.import_module(_PLANS).reshard(args)


def _serve(args: argparse.Namespace) -> None:
    importlib.import_module(_SERVER).serve_from(args)


def _config(args: argparse.Namespace) -> None:
    config = load_config(args.recipe) if args.recipe else None
    if not args.key and config:
        print(to_yaml(config), end="")
        return
    for doc in describe_settings(config, args.key):
        print(f"{doc.key} = {doc.value}")
        facts = [f"type: {doc.type}", f"default: {doc.default}"]
        facts += [
            f"{name}: {fact}"
            for name, fact in (("unit", doc.unit), ("bounds", doc.bounds), ("source", doc.source))
            if fact
        ]
        print(f"    {doc.meaning}\n    {'; '.join(facts)}")


if __name__ == "__main__":
    sys.exit(main())
