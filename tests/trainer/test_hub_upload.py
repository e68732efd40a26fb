"""Upload of a model to a stand-in of the hub: what arrives there, what stays here, and every refusal."""

from __future__ import annotations

import huggingface_hub
import pytest
from huggingface_hub import constants

from tests.hub_stand_in import TOKEN, hub_stand_in
from tests.training import toy_trainer
from verl.cli.main import main
from verl.trainer.export.hub_upload import HubUpload


@pytest.fixture(scope="module")
def run(letters, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("hub")
    toy_trainer("grpo", letters, folder, "steps=2").fit()
    return folder / "run"


@pytest.fixture
def hub(monkeypatch):
    """The stand-in, with a good token in the environment."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    huggingface_hub.close_session()  # it remembers being offline
    with hub_stand_in() as stand_in:
        monkeypatch.setenv("HF_ENDPOINT", stand_in.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield stand_in
    huggingface_hub.close_session()


def test_a_model_is_uploaded_with_its_card_and_nothing_else_of_the_folder(run, hub, tmp_path, capsys):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "notes.txt").write_text("private")
    assert main(["export", str(run), str(folder), "--push-to-hub", "me/model", "--private"]) == 0
    assert f"uploaded: {hub.url}/me/model" in capsys.readouterr().out
    sent = hub.files["me/model"]
    assert hub.private == {"me/model": True}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "training.png"} <= sent.keys()
    assert "notes.txt" not in sent
    assert all((folder / name).read_bytes() == content for name, content in sent.items())


def test_weights_of_an_earlier_upload_do_not_stay_beside_the_new_ones(run, hub, tmp_path):
    arguments = ["export", str(run), str(tmp_path), "--push-to-hub", "me/model"]
    assert main([*arguments, "--max-shard-size", "10KB"]) == 0
    assert "model.safetensors.index.json" in hub.files["me/model"]
    assert main(arguments) == 0
    assert [name for name in hub.files["me/model"] if "safetensors" in name] == ["model.safetensors"]
    assert [path.name for path in tmp_path.glob("*safetensors*")] == ["model.safetensors"]


def test_a_dry_run_says_what_it_would_send_without_token_and_network(run, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    arguments = ["export", str(run), str(tmp_path), "--push-to-hub", "me/model", "--private", "--dry-run"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    size = (tmp_path / "model.safetensors").stat().st_size
    assert "to the model repository me/model (private if it is new); nothing was sent" in shown
    assert f"{size:,} bytes  model.safetensors" in shown


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "refused me/model with 401 .*; the token is not valid: run `hf auth login`, or set another"),
        (403, "refused me/model with 403 .*; the token may not write there: take one with write access"),
        (404, "refused me/model with 404 .*; there is no such user or organization"),
    ],
)
def test_a_refusal_is_one_message_with_the_remedy(status, message, hub, tmp_path):
    hub.fails_with = status
    upload = HubUpload("me/model", tmp_path)
    with pytest.raises(ValueError, match=f"{message}.*; the model is in .*; send it later with `hf upload"):
        upload.send()


def test_a_wrong_token_is_refused(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(ValueError, match="with 401"):
        HubUpload("me/model", tmp_path).send()


def test_a_hub_that_is_not_there_is_one_message(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RuntimeError, match=r"cannot reach the hub at http://127.0.0.1:9 .*check network"):
        HubUpload("me/model", tmp_path).send()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    with pytest.raises(ValueError, match="but HF_HUB_OFFLINE is set; unset it"):
        HubUpload("me/model", tmp_path).send()


def test_without_a_token_or_a_name_nothing_is_written(run, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "absent"))
    out = tmp_path / "out"
    for arguments, message in (
        (["--push-to-hub", "me/model"], "need a token with write access to push to me/model"),
        (["--push-to-hub", "a/b/c"], "need USER/NAME for --push-to-hub, got 'a/b/c'"),
        (["--private"], "need --push-to-hub USER/NAME beside --private"),
    ):
        assert main(["export", str(run), str(out), *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not out.exists()
