"""Names of models that are neither a folder nor on the hub."""

from __future__ import annotations

import httpx2
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from verl.utils.hub import why_missing


def test_a_folder_is_there(tmp_path):
    assert why_missing(str(tmp_path)) is None


@pytest.mark.parametrize("source", ["/nowhere", "./nowhere", "~/nowhere", "a/b/c"])
def test_a_path_is_not_looked_up_on_the_hub(source, monkeypatch):
    monkeypatch.setattr(HfApi, "model_info", None)
    assert why_missing(source) == "there is no such folder"


def answer(monkeypatch, error: Exception) -> None:
    def model_info(self, repo_id, **_):
        raise error

    monkeypatch.setattr(HfApi, "model_info", model_info)


def test_a_hub_that_cannot_be_reached_is_asked_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer(monkeypatch, httpx2.ConnectError("Name or service not known"))
    reason = why_missing("nosuch")
    assert f"no such folder in {tmp_path}" in reason and "cannot be reached: Name or service" in reason


def test_a_model_that_the_hub_does_not_have_is_missing(monkeypatch):
    request = httpx2.Request("GET", "https://hub")
    answer(monkeypatch, HfHubHTTPError("no", response=httpx2.Response(404, request=request)))
    assert "has none that you may read (status 404)" in why_missing("org/nosuch")


def test_a_name_that_the_hub_cannot_have_is_a_missing_folder():
    assert "there is no such folder in " in why_missing("no such model")


def test_without_network_the_cache_counts(tmp_path, monkeypatch):
    def model_info(self, repo_id, **_):
        raise AssertionError("the cache has it")

    monkeypatch.setattr(HfApi, "model_info", model_info)
    monkeypatch.setattr("verl.utils.hub.try_to_load_from_cache", lambda name, file: str(tmp_path / file))
    assert why_missing("org/model") is None
