"""Base class of tools with state, under the name that verl gives it.

Methods and results are those of verl; here `create` and `release` are called once per episode, so what a tool
stores for an instance is there in all calls of its episode.
"""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from verl.tools.schemas import OpenAIFunctionToolSchema, ToolResponse


class BaseTool:
    """A tool with a state for each episode.

    Args:
        config: of its entry in the YAML file.
        tool_schema: in that entry; None: `get_openai_tool_schema` makes it.

    Attributes:
        name: of its schema.
    """

    def __init__(self, config: dict[str, Any], tool_schema: OpenAIFunctionToolSchema | None) -> None:
        self.config = config
        self.tool_schema = tool_schema  # `get_openai_tool_schema` may read it
        self.tool_schema = tool_schema or self.get_openai_tool_schema()
        if self.tool_schema is None:
            raise ValueError(
                f"need a schema of the tool {type(self).__name__}: give tool_schema in the YAML file, or "
                "override get_openai_tool_schema"
            )
        self.name = self.tool_schema.function.name

    def get_openai_tool_schema(self) -> OpenAIFunctionToolSchema | None:
        """Schema of the tool."""
        return self.tool_schema

    async def create(self, instance_id: str | None = None, **kwargs: Any) -> tuple[str, ToolResponse]:
        """Begin an episode.

        Args:
            instance_id: of the episode; None: a new one.
            **kwargs: `create_kwargs` of the row, as they are and under that name.

        Returns:
            The id, and a response that is not shown.
        """
        return instance_id or str(uuid4()), ToolResponse()

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        """Result of a call, its reward, and metrics.

        Args:
            instance_id: of the episode.
            parameters: arguments of the call.
            **kwargs: `execute_kwargs` of the row.
        """
        return ToolResponse(text="Updated the tool state."), 0.0, {}

    async def calc_reward(self, instance_id: str, **kwargs: Any) -> float:
        """Reward of the whole episode; counted only of a tool that overrides it."""
        return 0.0

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        """End an episode."""
        return
