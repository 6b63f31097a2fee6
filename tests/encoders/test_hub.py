"""Download of models from the Hugging Face Hub, and its errors."""

import re

import huggingface_hub
import pytest
from huggingface_hub import errors

from mister_jax.encoders import hub
from mister_jax.errors import InputError


def hub_error(error_class):
    """Returns an error without an HTTP response.

    The class of the response depends on the version of `huggingface_hub`.
    """
    return error_class.__new__(error_class)


def test_a_model_is_downloaded_once(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").touch()
    request = {}

    def download(name, **options):
        assert not request  # Only one download is allowed.
        request.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for _ in range(2):
        assert hub.fetch("someone/tiny-bert@v1") == tmp_path
    assert request["name"] == "someone/tiny-bert" and request["revision"] == "v1"
    assert "config.json" in request["allow_patterns"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: ConnectionError("no route\nto host"), r"cannot be downloaded .*\(no route\)"),
        (lambda: errors.LocalEntryNotFoundError("offline"), "cannot be downloaded .*offline"),
        (lambda: errors.HFValidationError("bad name"), "cannot be downloaded .*bad name"),
        (lambda: TimeoutError(), "cannot be downloaded .*TimeoutError"),
        (lambda: hub_error(errors.RepositoryNotFoundError), "no such model on the Hugging Face"),
        (lambda: hub_error(errors.GatedRepoError), "a gated model; request access at https://hug"),
        (lambda: hub_error(errors.RevisionNotFoundError), "no revision 'v1'"),
    ],
)
def test_a_name_that_cannot_be_downloaded_is_rejected(monkeypatch, error, message):
    def download(*_, **__):
        raise error()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(InputError, match=f"^someone/model(@v1)?: .*{message}") as raised:
        hub.fetch("someone/model@v1")
    assert "\n" not in str(raised.value)


def test_a_model_without_safetensors_is_rejected(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(InputError, match=re.escape("from_pretrained('someone/model')")):
        hub.fetch("someone/model")
