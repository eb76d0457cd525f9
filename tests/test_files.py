"""Files of other owners, hidden ones, and what is no file at all."""

import os

import pytest

from sd3_jax import files
from sd3_jax.errors import UserError
from sd3_jax.weights import safetensors


def test_an_owner_without_a_name(tmp_path, monkeypatch):
    """epath's stat asks for the names of owner and group."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"1234")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    assert files.size(path) == 4 and files.exists(path)


def test_hidden_names_are_no_files_of_a_model(tmp_path):
    for name in "b.safetensors", "a.json", "._b.safetensors", ".DS_Store":
        (tmp_path / name).touch()
    assert files.names(tmp_path) == ["a.json", "b.safetensors"]
    with pytest.raises(UserError, match="cannot be listed"):
        files.names(tmp_path / "none")


def test_a_pipe_is_refused_at_once(tmp_path):
    path = tmp_path / "a.safetensors"
    os.mkfifo(path)
    for read in files.read_bytes, files.require_regular, safetensors.open_file:
        with pytest.raises(UserError, match="is a pipe, a socket or a device"):
            read(path)
