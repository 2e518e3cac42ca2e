"""The terminal: short lines, above a bar where there is one."""

from __future__ import annotations

import io
import logging
import re
import sys
import threading
import time

import pytest
from tqdm import tqdm

from contextdiff_jax.runtime import terminal
from contextdiff_jax.training.log import summary_line

VALUES = {
    "loss": 0.48371,
    "denoise_loss": 0.4837,
    "grad_norm": 1.8812,
    "learning_rate": 6e-05,
    "nonfinite": 0.0,
    "broken_records": 0,
    "images_per_second": 137.22,
    "seconds_per_step": 2.0,
    "model_flops_per_second": 3e9,
}


def test_a_logged_step_is_one_short_line_whose_columns_stay_in_their_places():
    early, late = summary_line(50, 4000, VALUES), summary_line(3950, 4000, VALUES | {"loss": 12.0})
    assert early == (
        "step   50/4000  loss 0.4837    grad 1.88     lr 6e-05       137.2 images/s  2:11:40 left"
    )
    assert late.endswith("   1:40 left") and len(late) == len(early) <= 100
    assert [m.start() for m in re.finditer("loss|grad|lr|images", late)] == [
        m.start() for m in re.finditer("loss|grad|lr|images", early)
    ]


def test_a_line_says_what_went_wrong_and_leaves_out_what_a_training_lacks():
    assert summary_line(3, None, {"loss": 1.0}) == "step 3  loss 1       "
    line = summary_line(3, 9, VALUES | {"nonfinite": 2.0, "broken_records": 5})
    assert line.endswith("left  2 skipped steps  5 broken records")


@pytest.mark.parametrize("seconds, text", [(7, "0:07"), (127.4, "2:07"), (3727, "1:02:07")])
def test_a_duration_is_as_a_clock_shows_it(seconds, text):
    assert terminal.duration(seconds) == text


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def logger(monkeypatch):
    """A logger whose lines go to stderr as a command's."""
    logger = logging.Logger("some")
    logger.addHandler(terminal.LineHandler())
    return logger


def test_lines_without_a_terminal_have_the_time_and_no_more(logger, monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    logger.info("step %d", 3)
    logger.warning("odd")
    assert re.fullmatch(r"\d\d:\d\d:\d\d step 3\n\d\d:\d\d:\d\d warning: odd\n", stderr.getvalue())


def test_lines_on_a_terminal_stand_above_the_bar_and_the_bar_is_drawn_again(logger, monkeypatch):
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    with tqdm(
        total=4, initial=1, bar_format=terminal.TRAINING_BAR, file=stderr, ncols=80, disable=None
    ) as bar:
        bar.set_postfix_str("loss 0.48, 36.3 images/s")
        stderr.seek(stderr.truncate(0))
        logger.info("step 1")
    blank, line = stderr.getvalue().split("\n")[0].rsplit("\r", 1)[-1], stderr.getvalue()
    assert blank.strip() == "step 1"
    again = line.split("\n", 1)[1]
    assert "25%|" in again and "1/4, loss 0.48, 36.3 images/s, " in again and "left" in again


def test_what_is_done_soon_shows_no_bar_and_what_takes_long_does(monkeypatch):
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    assert list(terminal.bar([1, 2], "reading")) == [1, 2] and not stderr.getvalue()
    monkeypatch.setattr(terminal, "PATIENCE", 0)
    assert list(terminal.bar([1, 2], "reading")) == [1, 2] and "reading" in stderr.getvalue()


def test_while_one_long_call_runs_a_terminal_shows_the_time_that_goes_by(monkeypatch):
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(terminal, "PATIENCE", 0.01)
    with terminal.clock("drawing in 50 steps"):
        end = time.monotonic() + 60
        while "drawing in 50 steps, 00:00 so far" not in stderr.getvalue():
            assert time.monotonic() < end, stderr.getvalue()
            time.sleep(0.01)
        assert "clock" in {thread.name for thread in threading.enumerate()}
    assert "clock" not in {thread.name for thread in threading.enumerate()}
    assert not stderr.getvalue().rsplit("\r", 2)[-2].strip()  # the line is gone again


def test_without_a_terminal_no_time_is_shown_and_errors_go_through(monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    with pytest.raises(KeyError), terminal.clock("drawing in 50 steps"):
        assert "clock" not in {thread.name for thread in threading.enumerate()}
        raise KeyError("it")
    assert not stderr.getvalue()
