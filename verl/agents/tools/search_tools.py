"""The tool `search`: over a corpus in processes of its own, or at a retrieval server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import aiohttp
from typing_extensions import override

from verl.agents.processes.object_processes import ObjectProcesses
from verl.agents.processes.process_failure import ProcessFailure
from verl.agents.processes.reusable_processes import ReusableProcesses
from verl.agents.tools.corpus_search import CorpusOptions, Passage, check_corpus, described, passage_of
from verl.agents.tools.tool_source import EpisodeTools, SharedTools, ToolEpisode, ToolFailure, ToolSource
from verl.utils.event_loops import BackgroundLoop, within

DESCRIPTION = "Search for passages that help to answer a question. Returns the best ones with their titles."
# Processes with the index of a corpus, which they share; a search takes milliseconds.
_MAX_PROCESSES = 4
# For the index to be built.
_INDEX_LIMIT_S = 3600.0


def search_schema(name: str, description: str) -> dict[str, Any]:
    """Schema of the tool."""
    query = {"type": "string", "description": "Words or a question to search for."}
    parameters = {"type": "object", "properties": {"query": query}, "required": ["query"]}
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


def search_tools(options: Mapping[str, Any], *, timeout_s: float) -> ToolSource:
    """The tool `search` with its options: `corpus`, or `url` of a retrieval server.

    Args:
        options: with `corpus`: `top_k`, `passage_words`; with `url`: `top_k`; `tool_name` and `description`
            with both.
        timeout_s: limit of a call.

    Raises:
        ValueError: they are others, or the corpus has no texts.
    """
    own = dict(options)
    schema = search_schema(str(own.pop("tool_name", "search")), str(own.pop("description", DESCRIPTION)))
    if ("corpus" in own) == ("url" in own):
        raise ValueError(
            "need either a corpus or a url for the tool search, got "
            f"{', '.join(own) or 'no options'}: agent.tools=[{{name: search, corpus: texts.jsonl}}]"
        )
    kind: type[CorpusSearch] | type[ServerSearch] = CorpusSearch if "corpus" in own else ServerSearch
    known = {"corpus", "top_k", "passage_words"} if "corpus" in own else {"url", "top_k"}
    if unknown := own.keys() - known:
        raise ValueError(
            f"need options of the tool search among {', '.join(sorted(known))}, got "
            f"{', '.join(sorted(unknown))}"
        )
    return kind(schema, own, timeout_s=timeout_s)


class CorpusSearch(ToolSource):
    """Search over texts of one's own.

    Args:
        schema: of the tool.
        options: of `CorpusOptions`.
        timeout_s: limit of a call.

    Raises:
        ValueError: the corpus has no texts.
    """

    def __init__(self, schema: dict[str, Any], options: Mapping[str, Any], *, timeout_s: float) -> None:
        self.schemas = (schema,)
        corpus = CorpusOptions(**options)
        check_corpus(corpus)
        self._timeout_s = timeout_s
        processes = ObjectProcesses(
            corpus, max_processes=_MAX_PROCESSES, name="search", load_limit_s=_INDEX_LIMIT_S
        )
        self._processes = ReusableProcesses(processes, max_processes=_MAX_PROCESSES)

    @override
    def open(self, episode: ToolEpisode) -> EpisodeTools:
        return SharedTools(self.search)

    @override
    def close(self) -> None:
        self._processes.close()

    async def search(self, name: str, arguments: dict[str, Any]) -> Any:
        """Passages for a query; raises ToolFailure."""
        try:
            return await self._processes.call("search", arguments["query"], timeout_s=self._timeout_s)
        except ProcessFailure as failure:
            raise ToolFailure.of_process(failure) from failure


class ServerSearch(ToolSource):
    """Search at a retrieval server.

    It is asked as that of Search-R1: `{"queries": [...], "topk": 3, "return_scores": true}` is answered by
    `{"result": [[{"document": {...}, "score": ...}, ...]]}`, where documents may also come without scores.
    https://github.com/PeterGriffinJin/Search-R1

    Args:
        schema: of the tool.
        options: `url`, and `top_k` passages that a search returns.
        timeout_s: limit of a call.
    """

    def __init__(self, schema: dict[str, Any], options: Mapping[str, Any], *, timeout_s: float) -> None:
        self.schemas = (schema,)
        self._url, self._top_k = str(options["url"]), int(options.get("top_k", 3))
        if not self._url.startswith(("http://", "https://")):
            raise ValueError(f"need a url that begins with http for the tool search, got {self._url!r}")
        self._timeout_s = timeout_s
        self._loop: BackgroundLoop | None = None

    @override
    def open(self, episode: ToolEpisode) -> EpisodeTools:
        return SharedTools(self.search)

    @override
    def close(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.close()

    async def search(self, name: str, arguments: dict[str, Any]) -> Any:
        """Passages for a query; raises ToolFailure."""
        self._loop = self._loop or BackgroundLoop("search")
        body = {"queries": [arguments["query"]], "topk": self._top_k, "return_scores": True}
        try:
            reply = await within(self._timeout_s, self._loop.result_of(self._post(body)))
        except TimeoutError as error:
            raise ToolFailure("timeout", f"no result within {self._timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            detail = f"the server of search at {self._url} gives no result: {error or type(error).__name__}"
            raise ToolFailure("error", detail, "the search failed; it may work later") from error
        try:
            return described([hit(each, self._url) for each in reply["result"][0]])
        except (LookupError, TypeError, ValueError) as error:
            detail = (
                f'need {{"result": [[{{"document": ..., "score": ...}}]]}} from {self._url}, got '
                f"{str(reply)[:200]} ({error})"
            )
            raise ToolFailure("error", detail, "the search failed") from error

    async def _post(self, body: dict[str, Any]) -> Any:
        async with aiohttp.ClientSession() as session, session.post(self._url, json=body) as response:
            response.raise_for_status()
            return await response.json(content_type=None)


def hit(found: Any, place: str) -> Passage:
    """A passage of a reply.

    Raises:
        ValueError: it has no text.
    """
    document = found.get("document", found) if isinstance(found, Mapping) else found
    return Passage("", document) if isinstance(document, str) else passage_of(dict(document), place)
