"""The command line: run one command, and turn every error into one clear message and an exit code."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from verl.cli.parser import parse_arguments
from verl.config.layers import RECIPES
from verl.config.listing.reference import find_settings
from verl.config.loader import load_config, load_run, to_yaml
from verl.config.run import PreferenceConfig, RewardModelConfig, RunConfig, SFTConfig, TrainerConfig
from verl.utils.network import proxy_exceptions

_PAIR_AND_SFT_RUNS: dict[str, type[RunConfig]] = {
    "sft": SFTConfig,
    "preference": PreferenceConfig,
    "reward-model": RewardModelConfig,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; 1 if the run failed or a report found a problem; 2 if an argument, setting or file cannot be used;
        130 after an interrupt.
    """
    args = parse_arguments(argv)
    os.environ |= proxy_exceptions()
    # Read when PyTorch is loaded. Threads that wait actively for each other take the cores from other
    # programs; beside one other busy program, two threads were slower than one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # As with `python -m`: "my_module:function" in the settings is found in the folder where the command runs.
    sys.path.insert(0, "")
    try:
        command = COMMANDS[args.command]
        return (import_function(command) if isinstance(command, str) else command)(args) or 0
    except KeyboardInterrupt:
        goes_on = "the same command goes on with the answers that are kept"
        if args.command != "eval":
            goes_on = "started again, a run goes on from its newest checkpoint, or anew without one"
        print(f"interrupted; {goes_on}", file=sys.stderr)
        return 130
    except SystemExit as error:  # of a user's module or callback: else a run would end as if it were done
        if isinstance(error.__context__, BrokenPipeError):
            return 1  # by rich: who read the output, such as `head`, has ended
        if args.debug:
            traceback.print_exc()
        print(
            f"verl: code of the run ended the program by sys.exit({error.code!r}); leave that call out"
            + ("" if args.debug else "\n(--debug shows where)"),
            file=sys.stderr,
        )
        return 1
    except Exception as error:  # the process border: one clear message, the stack on request
        if args.debug:
            traceback.print_exc()
        is_users = isinstance(error, ValueError | FileNotFoundError)
        message = (
            str(error) if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: {error}"
        )
        hint = "" if is_users or args.debug else "\n(--debug shows where)"
        print(f"verl: {message}{hint}", file=sys.stderr)
        return 2 if is_users else 1


def import_function(target: str) -> Callable[..., int | None]:
    """The function "module:name"; its module is imported now, which may load PyTorch."""
    module, _, name = target.partition(":")
    function: Callable[..., int | None] = vars(importlib.import_module(module))[name]
    return function


def train(args: argparse.Namespace) -> None:
    """`verl train`."""
    # Before PyTorch is loaded: a mistake in the settings is reported at once.
    config = load_config(args.recipe, args.overrides)
    import_function("verl.cli.commands:fit")(config, dry_run=args.dry_run)


def train_on_data(args: argparse.Namespace) -> None:
    """`verl sft`, `preference` and `reward-model`, which need no recipe."""
    # A first argument with "=" is an override: the YAML file was left out.
    is_override = args.recipe is not None and "=" in args.recipe and not Path(args.recipe).exists()
    source = None if is_override else args.recipe
    overrides = [args.recipe, *args.overrides] if is_override else args.overrides
    config = load_run(_PAIR_AND_SFT_RUNS[args.command], source, overrides)
    import_function("verl.cli.commands:fit")(config, dry_run=args.dry_run)


def evaluate(args: argparse.Namespace) -> None:
    """`verl eval`."""
    is_override = args.target is not None and "=" in args.target and not Path(args.target).exists()
    if args.compare:
        if args.target is not None or args.overrides:
            raise ValueError("need --compare with two results and nothing else")
        import_function("verl.cli.evaluations:show_comparison")(*map(Path, args.compare))
        return
    if args.target is None or is_override:
        raise ValueError(
            f"need a recipe ({', '.join(RECIPES)}), a YAML file, the folder of a run, or a model before the "
            "settings, such as verl eval grpo policy.path=MODEL"
        )
    config = evaluated_run(args.target, args.overrides)
    import_function("verl.cli.evaluations:evaluate")(config, output=args.output, fresh=args.fresh)


def evaluated_run(target: str, overrides: Sequence[str]) -> TrainerConfig:
    """The settings of an evaluation: of a recipe, of a YAML file, of a run, or the defaults for a model.

    Args:
        target: recipe, YAML file, output_dir of a run, or folder or hub name of a model.
        overrides: `dotted.key=value`.

    Raises:
        ValueError: a run that has no model yet, or settings that cannot be used.
    """
    path = Path(target)
    settings = path / "config.yaml"
    if path.is_dir() and settings.exists():
        model = path / "model"
        if not model.is_dir():
            raise ValueError(
                f"need a run that is complete, but {path} has no folder model; write one of a checkpoint "
                f"with verl export {path} FOLDER, and evaluate that"
            )
        # Runs on data alone have neither rewards nor sampling of their own to be measured with.
        is_policy_run = "\nprompts_per_step:" in settings.read_text(encoding="utf-8")
        return load_config(str(settings) if is_policy_run else "grpo", [f"policy.path={model}", *overrides])
    is_hub_name = target.count("/") == 1 and path.suffix not in (".yaml", ".yml") and not path.exists()
    if path.is_dir() or is_hub_name:
        return load_config("grpo", [f"policy.path={target}", *overrides])
    return load_config(target, overrides)


def show_config(args: argparse.Namespace) -> None:
    """`verl config`."""
    config = load_config(args.recipe) if args.recipe else None
    if not args.key and config:
        print(to_yaml(config), end="")
        return
    for doc in find_settings(args.key, config):
        print(f"{doc.key} = {doc.value}")
        facts = [f"type: {doc.type}", f"default: {doc.default}"]
        facts += [
            f"{name}: {fact}"
            for name, fact in (("unit", doc.unit), ("bounds", doc.bounds), ("source", doc.source))
            if fact
        ]
        print(f"    {doc.meaning}\n    {'; '.join(facts)}")


# Command -> function of its arguments; a text "module:name" is imported when the command runs.
COMMANDS: dict[str, Callable[[argparse.Namespace], int | None] | str] = {
    "train": train,
    **dict.fromkeys(_PAIR_AND_SFT_RUNS, train_on_data),
    "eval": evaluate,
    "score": "verl.cli.score:score",
    "export": "verl.cli.commands:export",
    "serve": "verl.rollout.server.app:serve_from",
    "engines": "verl.cli.commands:engines",
    "ledger": "verl.monitoring.reports:ledger",
    "doctor": "verl.monitoring.reports:doctor",
    "plan": "verl.planner.reshard_report:reshard",
    "config": show_config,
    "data": "verl.cli.inspection.data_command:show_data",
    "quickstart": "verl.cli.commands:quickstart",
    "make-model": "verl.cli.commands:make_model",
    "make-data": "verl.cli.commands:make_data",
}


if __name__ == "__main__":
    sys.exit(main())
