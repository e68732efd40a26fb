"""Multi-turn episodes of the Berkeley Function Calling Leaderboard, `bfcl:multi_turn`, with its own checker.

https://gorilla.cs.berkeley.edu/leaderboard.html; PyPI bfcl-eval, of which only the data, the Python classes
that are the tools, and the checker are loaded. An episode calls these classes; at its end the calls of each
turn are made once more beside those of the ground truth, and states and results are compared.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from verl.agents.environments.observation import Observation
from verl.data.tasks.bfcl_tasks import ALL, bfcl_rows, categories_of, entry_of, lines_of

_CHECKER = "bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker"
_UTILS = "bfcl_eval.eval_checker.multi_turn_eval.multi_turn_utils"
_CONSTANTS = "bfcl_eval.constants"
# In place of a call of what is no tool; the checker evaluates it, which gives an error.
_NO_TOOL = "there_is_no_such_tool()"


class BfclEnvironment:
    """One episode.

    Args:
        name: of a category, or multi_turn for all 800 episodes.

    Attributes:
        tool_schemas: of the functions that the first turn offers.

    Raises:
        ValueError: no such name.
    """

    def __init__(self, name: str = ALL) -> None:
        self._name, self._categories = name, categories_of(name)
        self.tool_schemas: list[dict[str, Any]] = []
        self._entry: dict[str, Any] = {}
        self._added: dict[str, list[dict[str, Any]]] = {}
        self._turns: list[list[str]] = [[]]
        self._num_checks = 0

    def rows(self, split: str, **options: Any) -> list[dict[str, Any]]:
        """Rows of `task:bfcl/NAME`, the same in both splits."""
        return bfcl_rows(self._name, options)

    def reset(self, id: str, prompt: Any = None) -> Observation:
        """Begin the episode of that id, such as multi_turn_base_7."""
        category = id.rpartition("_")[0]
        if category not in self._categories:
            raise ValueError(f"need an id of {', '.join(self._categories)}, got {id!r}")
        self._entry = entry_of(f"BFCL_v4_{category}.json", id)
        documents = documents_of(self._entry)
        held_out = self._entry.get("missed_function", {})
        self._added = {turn: [documents.pop(name) for name in names] for turn, names in held_out.items()}
        self.tool_schemas = [schema_of(document) for document in documents.values()]
        self._turns = [[]]
        self.execute([])
        first = self._entry["question"][0]
        return Observation() if prompt == first else Observation(messages=first, replaces_prompt=True)

    def call_tool(self, name: str, arguments: Mapping[str, Any]) -> Observation:
        """Result of a call, as bfcl tells it, errors among them."""
        methods = self.execute([])[1]
        is_tool = any(inspect.ismethod(getattr(one, name, None)) for one in methods.values())
        if not is_tool or name.startswith("_"):
            self._turns[-1].append(_NO_TOOL)
            return Observation(
                f"Error during execution: name {name!r} is not defined", metrics={"bfcl_errors": 1}
            )
        if wrong := [key for key in arguments if not key.isidentifier()]:
            self._turns[-1].append(_NO_TOOL)
            text = f"Error during execution: {wrong[0]!r} is not the name of an argument"
            return Observation(text, metrics={"bfcl_errors": 1})
        call = written(name, [], arguments)
        self._turns[-1].append(call)
        text = self.execute([call])[0][0]
        return Observation(text, metrics={"bfcl_errors": float(text.startswith("Error during execution"))})

    def step(self, message: Mapping[str, Any]) -> Observation:
        """The next turn of the user, maybe with functions that were held out before."""
        number = len(self._turns)
        if number == len(self._entry["question"]):
            return Observation(is_over=True)
        self._turns.append([])
        added = self._added.get(str(number))
        if added is None:
            return Observation(messages=self._entry["question"][number])
        prompts = importlib.import_module(f"{_CONSTANTS}.default_prompts")
        text = prompts.DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_PROMPTING
        return Observation(text.format(functions=json.dumps([schema_of(one) for one in added])))

    def get_reward(self, messages: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """1 if states and results after every turn are those of the ground truth, else 0 and the cause."""
        category = self._entry["id"].rpartition("_")[0]
        truth = entry_of(f"possible_answer/BFCL_v4_{category}.json", self._entry["id"])["ground_truth"]
        limit = importlib.import_module(f"{_CONSTANTS}.default_prompts").MAXIMUM_STEP_LIMIT
        if len(self._turns) < len(truth) or max(steps_of(messages, self._turns), default=0) > limit:
            return {"score": 0.0, "acc": 0.0, "bfcl_fault": "multi_turn:force_terminated"}
        self._num_checks += 1
        verdict = importlib.import_module(_CHECKER).multi_turn_checker(
            [[[call] for call in turn] for turn in self._turns],
            [[rewritten(call) for call in turn] for turn in truth],
            self._entry,
            category,
            f"check{self._num_checks}",
        )
        score = float(verdict["valid"])
        return {"score": score, "acc": score, "bfcl_fault": verdict.get("error_type", "")}

    def execute(self, calls: list[str]) -> tuple[list[str], dict[str, Any]]:
        """Results of calls in this episode, and the objects with the methods that are the tools."""
        results, objects = importlib.import_module(_UTILS).execute_multi_turn_func_call(
            calls,
            self._entry["initial_config"],
            self._entry["involved_classes"],
            "policy",
            self._entry["id"],
            long_context="long_context" in self._entry["id"],
        )
        return results, objects


def documents_of(entry: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Documents of the functions of an entry, by name."""
    backend = importlib.import_module(f"{_CONSTANTS}.executable_backend_config")
    found = {}
    for name in entry["involved_classes"]:
        path = f"multi_turn_func_doc/{backend.MULTI_TURN_FUNC_DOC_FILE_MAPPING[name]}"
        found.update({document["name"]: document for document in map(json.loads, lines_of(path))})
    return found


def schema_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a function, from its document."""
    function = {key: document[key] for key in ("name", "description")}
    return {"type": "function", "function": {**function, "parameters": json_types(document["parameters"])}}


def json_types(schema: Any) -> Any:
    """A schema with the types of JSON in place of the types of the documents."""
    if isinstance(schema, list):
        return [json_types(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    types = importlib.import_module(f"{_CONSTANTS}.type_mappings").GORILLA_TO_OPENAPI
    return {
        key: types.get(value, value) if key == "type" and isinstance(value, str) else json_types(value)
        for key, value in schema.items()
    }


def written(name: str, values: Sequence[Any], arguments: Mapping[str, Any]) -> str:
    """A call as Python code of plain values, as the checker takes it.

    It looks for names before parentheses, and would change them in texts too; so no text has a parenthesis.
    """
    parts = [repr(value) for value in values] + [f"{key}={value!r}" for key, value in arguments.items()]
    return f"{name}({', '.join(part.replace('(', chr(92) + 'x28') for part in parts)})"


def rewritten(call: str) -> str:
    """A call of the ground truth in the same form."""
    tree = ast.parse(call, mode="eval").body
    assert isinstance(tree, ast.Call), call
    values = [ast.literal_eval(value) for value in tree.args]
    arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in tree.keywords}
    return written(ast.unparse(tree.func), values, arguments)


def steps_of(messages: Sequence[Mapping[str, Any]], turns: Sequence[Sequence[str]]) -> list[int]:
    """Turns of the policy with calls in each turn of the user.

    Args:
        messages: the conversation.
        turns: calls in each turn of the user.
    """
    sizes = [len(message["tool_calls"]) for message in messages if message.get("tool_calls")]
    found = []
    for turn in turns:
        left, steps = len(turn), 0
        while left > 0 and sizes:
            left, steps = left - sizes.pop(0), steps + 1
        found.append(steps)
    return found
