"""Built-in tool `search` over texts of one's own: a folder or a JSONL file, ranked by BM25.

The index is built once, in the process from which those of the calls are forked, so that they share it.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIXES = {".txt", ".md", ".rst"}


@dataclass(frozen=True)
class Passage:
    """A text that a search finds.

    Attributes:
        title: of its document.
        text: of the passage.
    """

    title: str
    text: str


@dataclass(frozen=True)
class CorpusOptions:
    """Options of `search` over a corpus.

    Attributes:
        corpus: folder with texts, or a JSONL file with `text` or `contents`, and maybe `title` or `id`.
        top_k: passages that a search returns.
        passage_words: longer texts of a folder are split.
    """

    corpus: str
    top_k: int = 3
    passage_words: int = 200

    def __reduce__(self) -> tuple[Any, ...]:
        # A process that unpickles the options gets what makes a searcher, with the index built.
        return searcher, (self.corpus, self.top_k, self.passage_words)


class Searcher:
    """Passages and their BM25 index.

    Args:
        passages: at least one.
        top_k: passages that a search returns.
    """

    def __init__(self, passages: list[Passage], top_k: int) -> None:
        self._bm25s = importlib.import_module("bm25s")
        self._passages, self._top_k = passages, min(top_k, len(passages))
        texts = [f"{passage.title}\n{passage.text}" for passage in passages]
        self._index = self._bm25s.BM25(backend="numpy")
        self._index.index(self._bm25s.tokenize(texts, show_progress=False), show_progress=False)

    def __call__(self) -> Searcher:
        """Itself, as the object of a process."""
        return self

    def search(self, query: str) -> str:
        """Passages for a query, the best first, each with its title."""
        tokens = self._bm25s.tokenize([query], return_ids=False, show_progress=False)
        found, scores = self._index.retrieve(
            tokens, k=self._top_k, show_progress=False, backend_selection="numpy"
        )
        hits = [self._passages[i] for i, score in zip(found[0], scores[0], strict=True) if score > 0]
        return described(hits)


def described(hits: list[Passage]) -> str:
    """Passages as the policy reads them."""
    if not hits:
        return "Nothing was found; try other words."
    return "\n\n".join(
        f"[{number}] {hit.title}\n{hit.text}" if hit.title else f"[{number}] {hit.text}"
        for number, hit in enumerate(hits, 1)
    )


def searcher(corpus: str, top_k: int, passage_words: int) -> Searcher:
    """The searcher of a corpus."""
    return Searcher(list(read_corpus(Path(corpus), passage_words)), top_k)


def check_corpus(options: CorpusOptions) -> None:
    """Check that a corpus exists and begins with a passage, and that it can be indexed.

    Raises:
        ValueError: not so.
    """
    try:
        importlib.import_module("bm25s")
    except ImportError as error:
        raise ValueError('need bm25s for the tool search: pip install "verl[search]"') from error
    if options.top_k < 1 or options.passage_words < 1:
        raise ValueError(f"need top_k and passage_words of at least 1 for the tool search, got {options}")
    if next(read_corpus(Path(options.corpus), options.passage_words), None) is None:
        raise ValueError(
            f"need texts for the tool search, found none in {options.corpus}: a JSONL file with `text` or "
            f"`contents` in each line, or a folder of {', '.join(sorted(SUFFIXES))}"
        )


def read_corpus(path: Path, passage_words: int) -> Iterator[Passage]:
    """Passages of a folder or a JSONL file.

    Raises:
        ValueError: it does not exist, or a line is no document.
    """
    path = path.expanduser()
    if path.is_dir():
        for file in sorted(each for each in path.rglob("*") if each.suffix in SUFFIXES):
            title = str(file.relative_to(path).with_suffix(""))
            yield from split(title, file.read_text(encoding="utf-8", errors="replace"), passage_words)
    elif path.is_file():
        with path.open(encoding="utf-8") as lines:
            yield from (
                document(line, f"{path}, line {number}")
                for number, line in enumerate(lines, 1)
                if line.strip()
            )
    else:
        raise ValueError(f"need a folder or a JSONL file as the corpus of the tool search, {path} is neither")


def split(title: str, text: str, passage_words: int) -> Iterator[Passage]:
    """Passages of a text: whole paragraphs, up to a number of words."""
    gathered: list[str] = []
    num_words = 0
    for paragraph in filter(None, (each.strip() for each in text.split("\n\n"))):
        words = paragraph.split()
        if gathered and num_words + len(words) > passage_words:
            yield Passage(title, "\n\n".join(gathered))
            gathered, num_words = [], 0
        while len(words) > passage_words:
            yield Passage(title, " ".join(words[:passage_words]))
            words = words[passage_words:]
            paragraph = " ".join(words)
        gathered.append(paragraph)
        num_words += len(words)
    if gathered:
        yield Passage(title, "\n\n".join(gathered))


def document(line: str, place: str) -> Passage:
    """The document of a line, in the form of Search-R1's corpora or with a title and a text.

    Raises:
        ValueError: it is none.
    """
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"need JSON in {place}: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"need an object in {place}, got {type(row).__name__}")
    return passage_of(row, place)


def passage_of(row: dict[str, Any], place: str) -> Passage:
    """A passage from `text`, `contents` or `content`, and `title`; Search-R1 has the title in the first line.

    Raises:
        ValueError: it has no text.
    """
    text = next((row[name] for name in ("text", "contents", "content") if row.get(name)), None)
    if not isinstance(text, str):
        raise ValueError(f"need `text` or `contents` in {place}, got {', '.join(map(str, row)) or 'nothing'}")
    title = row.get("title")
    if not title and "contents" in row and "\n" in text:
        head, _, text = text.partition("\n")
        title = head.strip().strip('"')
    return Passage(str(title or row.get("id") or ""), text.strip())
