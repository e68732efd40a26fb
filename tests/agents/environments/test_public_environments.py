"""Environments from PyPI: the table of the documentation, and that it is still true."""

from __future__ import annotations

import json
import os

import pytest

from tests.agents.environments.public_environments import (
    CASES,
    FOLDER,
    PYTHONS,
    RESULTS,
    ROOT,
    documented_table,
    make_model,
    result_of,
    title,
)

KNOWN = {row["environment"]: row for row in json.loads(RESULTS.read_text())}


def test_the_table_of_the_documentation_is_what_was_measured():
    page = (ROOT / "docs" / "environments.md").read_text(encoding="utf-8")
    assert documented_table(list(KNOWN.values())) in page
    assert list(KNOWN) == [title(case) for case in CASES]


def test_fifteen_environments_from_pypi_are_trained_in():
    assert sum(row["result"] == "trained" for row in KNOWN.values()) >= 15


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.environments
@pytest.mark.parametrize("case", CASES, ids=title)
def test_an_environment_from_pypi_is_trained_in(case, model, tmp_path, monkeypatch):
    missing = [folder for folder in PYTHONS if not (ROOT / folder / "bin" / "python").exists()]
    assert not missing, f"need {', '.join(missing)}; run: make environments"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FOLDER / "packages"), str(ROOT)]))
    found, known = result_of(case, model, tmp_path), KNOWN[title(case)]
    assert (found["result"], found.get("tools")) == (known["result"], known.get("tools"))
