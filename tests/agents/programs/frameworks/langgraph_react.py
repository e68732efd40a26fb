"""An agent of LangGraph with the chat model of langchain-openai."""

import json
import os

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition


@tool
def add(a: float, b: float) -> str:
    """Sum of two numbers."""
    return f"{a + b:g}"


model = ChatOpenAI(model="policy").bind_tools([add])


def policy(state: MessagesState):
    return {"messages": [model.invoke(state["messages"])]}


graph = StateGraph(MessagesState)
graph.add_node("policy", policy)
graph.add_node("tools", ToolNode([add]))
graph.add_edge(START, "policy")
graph.add_conditional_edges("policy", tools_condition)
graph.add_edge("tools", "policy")
task = json.loads(os.environ["TASK_JSON"])
last = graph.compile().invoke({"messages": task["prompt"]})["messages"][-1]
print(json.dumps({"reward": float(last.content == "5")}))
