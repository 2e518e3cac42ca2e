"""Files that are complete or absent."""

import pytest

from contextdiff_jax.files import replacing


def test_a_file_is_replaced_at_the_end(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing(path) as file:
        file.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half"), replacing(path) as file:
        file.write_text("ne")
        raise RuntimeError("half")
    assert path.read_text() == "old"
