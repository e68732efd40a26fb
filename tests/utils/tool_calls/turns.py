"""Turns with two calls, as each form writes them."""

# ruff: noqa: E501

from __future__ import annotations

from typing import Any


def tool(name: str, **types: str) -> dict[str, Any]:
    """The schema of a tool, with the type of each parameter."""
    properties = {key: {"type": kind} for key, kind in types.items()}
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [
    tool("search", query="string", top="integer", exact="boolean", tags="array"),
    tool("now"),
]
ARGUMENTS = {"query": 'a "b" <c>\nd', "top": 3, "exact": True, "tags": ["x", "y"]}
JSON = '{"query": "a \\"b\\" <c>\\nd", "top": 3, "exact": true, "tags": ["x", "y"]}'

TURNS = {
    "hermes": (
        f'One moment.\n<tool_call>\n{{"name": "search", "arguments": {JSON}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    ),
    "qwen3_coder": (
        "One moment.\n<tool_call>\n<function=search>\n<parameter=query>\n"
        'a "b" <c>\nd\n</parameter>\n<parameter=top>\n3\n</parameter>\n<parameter=exact>\nTrue\n</parameter>\n'
        "<parameter=tags>\n[\"x\", 'y']\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=now>\n</function>\n</tool_call>"
    ).replace("[\"x\", 'y']", '["x", "y"]'),
    "llama3": f'One moment.{{"name": "search", "parameters": {JSON}}}; {{"name": "now", "parameters": {{}}}}',
    "pythonic": (
        "One moment.\n[search(query='a \"b\" <c>\\nd', top=3, exact=True, tags=['x', \"y\"]), now()]"
    ),
    "mistral": (
        f'One moment.[TOOL_CALLS][{{"name": "search", "arguments": {JSON}}}, {{"name": "now", "arguments": {{}}}}]'
    ),
    "gemma": (
        'One moment.<start_function_call>call:search{exact:true,query:<escape>a "b" <c>\nd<escape>,tags:'
        "[<escape>x<escape>,<escape>y<escape>],top:3}<end_function_call>"
        "<start_function_call>call:now{}<end_function_call><start_function_response>"
    ),
    "gemma4": (
        'One moment.<|tool_call>call:search{exact:true,query:<|"|>a "b" <c>\nd<|"|>,tags:'
        '[<|"|>x<|"|>,<|"|>y<|"|>],top:3}<tool_call|><|tool_call>call:now{}<tool_call|>'
    ),
    "glm": (
        "One moment.\n<tool_call>search\n<arg_key>query</arg_key>\n"
        '<arg_value>a "b" <c>\nd</arg_value>\n<arg_key>top</arg_key>\n<arg_value>3</arg_value>\n'
        "<arg_key>exact</arg_key>\n<arg_value>true</arg_value>\n<arg_key>tags</arg_key>\n"
        '<arg_value>["x", "y"]</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>'
    ),
    "deepseek": (
        "One moment.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>search\n"
        f"```json\n{JSON}\n```<｜tool▁call▁end｜>\n"
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),
    "deepseek_v32": (
        'One moment.\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="search">\n'
        '<｜DSML｜parameter name="query" string="true">a "b" <c>\nd</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="top" string="false">3</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="exact" string="false">true</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="tags" string="false">["x", "y"]</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        '<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>'
    ),
    "kimi_k2": (
        "One moment.<|tool_calls_section_begin|><|tool_call_begin|>functions.search:0"
        f"<|tool_call_argument_begin|>{JSON}<|tool_call_end|>"
        "<|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_calls_section_end|>"
    ),
    "harmony": (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>One moment."
        "<|end|><|start|>assistant<|channel|>commentary to=functions.search <|constrain|>json<|message|>"
        f"{JSON}<|call|><|start|>assistant to=functions.now<|channel|>commentary json<|message|>{{}}"
    ),
    "granite": (
        f'One moment.<|tool_call|>[{{"name": "search", "arguments": {JSON}}}, {{"name": "now", "arguments": {{}}}}]'
    ),
    "minimax": (
        'One moment.\n<minimax:tool_call>\n<invoke name="search">\n<parameter name="query">a "b" <c>\nd</parameter>'
        '\n<parameter name="top">3</parameter>\n<parameter name="exact">true</parameter>\n'
        '<parameter name="tags">["x", "y"]</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n'
        "</minimax:tool_call>"
    ),
    "seed_oss": (
        "One moment.\n<seed:tool_call>\n<function=search>\n<parameter=query>"
        'a "b" <c>\nd</parameter>\n<parameter=top>3</parameter>\n<parameter=exact>true</parameter>\n'
        '<parameter=tags>["x", "y"]</parameter>\n</function>\n</seed:tool_call>\n'
        "<seed:tool_call>\n<function=now>\n</function>\n</seed:tool_call>"
    ),
}
# Forms of the same parser that the table has not.
FURTHER = [
    ("deepseek", f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>search<｜tool▁sep｜>{JSON}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
    ("mistral", f"[TOOL_CALLS]search[ARGS]{JSON}"),
    ("mistral", f"[TOOL_CALLS]search[CALL_ID]abcdefghi[ARGS]{JSON}"),
    ("llama3", f'<|python_tag|>{{"type": "function", "name": "search", "parameters": {JSON}}}'),
    ("llama3", f'{{"name": "search", "arguments": {JSON}}}'),
    ("pythonic", "<|python_start|>[search('a \"b\" <c>\\nd', 3, exact=true, tags=('x', 'y'))]<|python_end|>"),
    ("pythonic", "<|tool_call_start|>[search(query=r'''a \"b\" <c>\nd''', top=3, exact=True, tags=['x','y'])]"),
    ("hermes", f'<tool_call>{{"name": "search", "arguments": {JSON}}}'),
    ("qwen3_coder", '<function=search><parameter=query>a "b" <c>\nd</parameter><parameter=top>3.0</parameter>'
     '<parameter=exact>true</parameter><parameter=tags>[\'x\', "y"]</parameter></function></tool_call>'),
]  # fmt: skip
