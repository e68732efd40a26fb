"""Search over texts of one's own, and at a retrieval server."""

from __future__ import annotations

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tests.agents.tools.test_tool_set import call
from verl.agents.tools.corpus_search import read_corpus
from verl.agents.tools.tool_set import build_tools
from verl.config.agent import AgentConfig

ROWS = [
    {"title": "Bonn", "text": "Bonn is a city on the river Rhine."},
    {"id": "7", "contents": '"Oslo"\nOslo is the capital of Norway.'},
    {"id": "8", "contents": "The Danube flows through Vienna."},
]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    return path


def built(**options):
    return build_tools(AgentConfig(tools=[{"name": "search", **options}]))


def test_the_best_passages_of_a_file_come_first(corpus):
    tools = built(corpus=str(corpus), top_k=2)
    assert (
        call(tools, "search", query="capital of Norway?").text == "[1] Oslo\nOslo is the capital of Norway."
    )
    assert call(tools, "search", query="xyzzy").text == "Nothing was found; try other words."
    tools.close()


def test_texts_of_a_folder_are_split_between_paragraphs(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.md").write_text("one two\n\nthree\n\n" + "word " * 7)
    (tmp_path / "b.bin").write_text("no text")
    passages = list(read_corpus(tmp_path, 3))
    assert [(p.title, p.text) for p in passages] == [
        ("deep/a", "one two\n\nthree"),
        ("deep/a", "word word word"),
        ("deep/a", "word word word"),
        ("deep/a", "word"),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corpus": "missing.jsonl"}, "need a folder or a JSONL file as the corpus"),
        ({"corpus": "{folder}"}, "need texts for the tool search, found none in"),
        ({"corpus": "{folder}", "url": "http://x"}, "need either a corpus or a url"),
        (
            {"corpus": "{folder}", "k": 3},
            "need options of the tool search among corpus, passage_words, top_k, got k",
        ),
        ({"url": "localhost:80"}, "need a url that begins with http"),
    ],
)
def test_options_that_cannot_work_are_named(tmp_path, options, message):
    filled = {k: v.format(folder=tmp_path) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(ValueError, match=message):
        built(**filled)


def test_a_line_that_is_no_document_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"title": "a"}\n')
    with pytest.raises(ValueError, match="need `text` or `contents` in .*x.jsonl, line 1, got title"):
        built(corpus=str(tmp_path / "x.jsonl"))


@pytest.fixture
def server():
    """A server in the form of Search-R1's; it answers with the next of `replies`."""
    requests, replies = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            reply = replies.pop(0)
            self.send_response(500 if reply is None else 200)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/retrieve", requests, replies
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_retrieval_server_is_asked_as_that_of_search_r1(server):
    url, requests, replies = server
    replies += [
        {"result": [[{"document": ROWS[1], "score": 0.9}, {"document": "plain", "score": 0.1}]]},
        {"result": [[ROWS[0]]]},
        None,
        {"results": []},
    ]
    tools = built(url=url, top_k=2, tool_name="find")
    results = [call(tools, "find", query=word) for word in "abcd"]
    assert requests[0] == {"queries": ["a"], "topk": 2, "return_scores": True}
    assert results[0].text == "[1] Oslo\nOslo is the capital of Norway.\n\n[2] plain"
    assert results[1].text == "[1] Bonn\nBonn is a city on the river Rhine."
    assert results[2].outcome == results[3].outcome == "error"
    assert "500" in results[2].detail and url in results[2].detail and url not in results[2].text
    assert 'need {"result":' in results[3].detail
    tools.close()


def test_a_server_that_is_gone_is_an_error_of_the_call():
    tools = built(url="http://127.0.0.1:9/retrieve")
    result = call(tools, "search", query="x")
    assert result.outcome == "error" and "127.0.0.1:9" in result.detail
    assert result.text == "Error: the search failed; it may work later"
    tools.close()


def test_many_searches_share_the_processes(corpus):
    tools = built(corpus=str(corpus), top_k=1)
    results = asyncio.run(searches(tools, 20))
    assert {result.text for result in results} == {"[1] Bonn\nBonn is a city on the river Rhine."}
    tools.close()


async def searches(tools, number):
    run = tools._sources[0].search
    values = await asyncio.gather(*[run("search", {"query": "Rhine"}) for _ in range(number)])
    return [type("R", (), {"text": value})() for value in values]
