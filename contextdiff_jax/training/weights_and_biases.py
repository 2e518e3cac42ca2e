"""A run in Weights & Biases (`log.wandb`): its lines, pictures and config, beside metrics.jsonl."""

from __future__ import annotations

import importlib.util
import json
import logging
import secrets
import tempfile
from collections.abc import Mapping
from typing import Any

from etils import epath
from PIL.Image import Image

from contextdiff_jax.runtime.errors import RunError, one_line
from contextdiff_jax.runtime.host import is_remote
from contextdiff_jax.settings.log import LogConfig

LOGGER = logging.getLogger(__name__)
IDENTITY = "wandb_run"  # the file with the name that W&B knows the run by: resumed, it goes on


def check_wandb(log: LogConfig) -> None:
    """Raises ValueError where `log.wandb` asks for what isn't installed. Called before the work."""
    if log.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"log.wandb={log.wandb!r}: wandb isn't installed; pip install "
            "'contextdiff_jax[wandb]', or leave log.wandb empty"
        )


class WeightsAndBiases:
    """One run of a project. It is sent by a process of wandb's own; what fails there ends the
    sending, with one warning, and never the training.

    Raises RunError where nobody is logged in.
    """

    def __init__(self, project: str, workdir: epath.Path):
        import wandb

        team, _, name = project.rpartition("/")
        config = workdir / "config.json"
        try:
            self._run = wandb.init(
                project=name,
                entity=team or None,
                name=workdir.name,
                id=_identity(workdir),
                resume="allow",
                dir=tempfile.mkdtemp() if is_remote(workdir) else str(workdir),
                config=json.loads(config.read_text()) if config.exists() else None,
                settings=wandb.Settings(console="off"),  # or it takes the terminal's place
            )
        except wandb.errors.Error as error:
            raise RunError(
                f"log.wandb={project!r}: {one_line(error)}; run `wandb login`, or set "
                "WANDB_MODE=offline and send the run later by `wandb sync`"
            ) from error
        self._image = wandb.Image
        # W&B's own step only grows: what is logged again after a restart would be dropped
        self._run.define_metric("*", step_metric="step")

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Sends a logged step."""
        self._send({"step": step, **values})

    def show(self, step: int, name: str, picture: Image) -> None:
        """Sends a picture."""
        self._send({"step": step, name: self._image(picture)})

    def _send(self, values: dict[str, Any]) -> None:
        if self._run is None:
            return
        try:
            self._run.log(values)
        except Exception as error:  # training goes on, whatever it is
            LOGGER.warning("nothing more is sent to Weights & Biases: %s", one_line(error))
            self._run = None

    def close(self) -> None:
        """Waits until all is sent, or written where wandb is offline."""
        if self._run is not None:
            self._run.finish()


def _identity(workdir: epath.Path) -> str:
    """The run's name in W&B, of this workdir alone."""
    file = workdir / IDENTITY
    if not file.exists():
        file.write_text(secrets.token_hex(6))
    return file.read_text().strip()
