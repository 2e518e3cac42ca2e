"""Files that are complete or absent."""

import resource

import numpy as np
import pytest

from contextdiff_jax.pretrained.one_file import save_tensors
from contextdiff_jax.runtime.errors import one_line
from contextdiff_jax.runtime.files import read_lines, replacing

WHOLE = b'{"step": 1}\n{"step": 2}\n'


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


@pytest.mark.parametrize(
    "text, steps",
    [
        (WHOLE, [1, 2]),
        (b'{"step": 1}\n{"step": 2, "lo', [1]),
        (b'{"step": 1}\n{"step": 2, "lo{"step": 3}\n{"step": 4}\n', [1, 4]),
        (b'{"step": 1}\n\0\0\0\0\0{"step": 3}\n', [1]),
        (b'{"step": 1}\n\xff\xfe}\n[3]\n4}\n}\n\n{"step": 5}', [1, 5]),
        (b"", []),
    ],
)
def test_torn_lines_of_a_log_are_left_out_and_said(text, steps, tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(text)
    assert [row["step"] for row in read_lines(path)] == steps
    assert ("torn or damaged" in caplog.text) == (text not in (WHOLE, b""))


def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match="No space left on device.*a.json"):
        with replacing(tmp_path / "a.json"), open("/dev/full", "w", buffering=1) as file:
            file.write("new\n")


def test_weights_that_find_no_room_are_one_line_and_leave_the_old_ones(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors({"x": np.ones(3)}, path)
    old, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, limits[1]))  # bytes a file; as a full disk
    try:
        with pytest.raises(OSError, match="a.safetensors: can't be written .*File too large"):
            save_tensors({"x": np.zeros(2**16)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == old


def test_an_error_is_one_line_and_its_class_where_it_has_no_text():
    assert one_line(ValueError(" two\n  lines ")) == "two lines"
    assert one_line(AssertionError()) == "AssertionError"
