"""The four trackers: where each keeps its files, how it goes on with the same run, and how it is shown a picture.

Accelerate's trackers do the telling; here stands what makes them local and continued. Nothing leaves the machine unless
the user's environment says so (WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID).
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from PIL import Image

from mim.config import to_yaml
from mim.data.location import redact

PROJECT = "mimstream"
OFFLINE = {  # what the libraries would send without being asked; the user's own environment goes first
    "wandb": {"WANDB_ERROR_REPORTING": "false"},
    "trackio": {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"},
    "mlflow": {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ALLOW_FILE_STORE": "true"},
}


@dataclass
class Place:
    """Where a tracker keeps its own files, and what it needs to go on with the same run."""

    folder: Path  # RUN/trackers
    run: str  # name of the run
    state: dict[str, Any]  # of NAME.json: id, told
    sections: dict[str, Any]  # the recipe
    cut_at: int  # step that the log was cut back to, -1 at a fresh start


@dataclass(frozen=True)
class Kind:
    """How a tracker is opened and shown a picture."""

    open: Callable[[Place], Any]  # -> accelerate.tracking.GeneralTracker, started
    show: Callable[[Any, str, Path, int], None]
    takes_back: bool = False


def open_tensorboard(place: Place) -> Any:
    """Event files in RUN/trackers/tensorboard; a reader drops what an earlier attempt wrote after the resumed step."""
    # A reader takes the files in the order of their names, which hold the second and the number of the process.
    while any((place.folder / "tensorboard").glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
        time.sleep(0.05)
    tracker = _accelerate("tensorboard")("tensorboard", place.folder, purge_step=place.cut_at + 1)
    tracker.start()
    if not place.state.get("id"):
        place.state["id"] = "tensorboard"
        tracker.tracker.add_text("recipe", "\n".join(f"    {line}" for line in to_yaml(place.sections).splitlines()), 0)
    return tracker


def open_wandb(place: Place) -> Any:
    """A run of W&B, offline unless WANDB_MODE says otherwise; the same id at every resume."""
    first = _new_id(place)
    settings = {"silent": True, "console": "off", "disable_git": True, "x_disable_meta": True}
    tracker = _accelerate("wandb")(
        os.environ.get("WANDB_PROJECT", PROJECT),
        dir=str(place.folder),
        id=place.state["id"],
        name=place.run,
        resume="allow",
        mode=os.environ.get("WANDB_MODE", "offline"),
        settings=settings,
    )
    tracker.start()
    if first:
        tracker.store_init_configuration(flat(place.sections))
    return tracker


def open_trackio(place: Place) -> Any:
    """A run in RUN/trackers/trackio, unless TRACKIO_DIR or TRACKIO_SPACE_ID names another place."""
    first = _new_id(place)
    os.environ.setdefault("TRACKIO_DIR", str((place.folder / "trackio").absolute()))
    tracker = _accelerate("trackio")(PROJECT, name=f"{place.run}-{place.state['id']}", resume="allow", embed=False)
    tracker.start()
    if first:
        tracker.store_init_configuration(flat(place.sections))
    return tracker


def open_mlflow(place: Place) -> Any:
    """A run in the file store RUN/trackers/mlflow, unless MLFLOW_TRACKING_URI names a server."""
    import mlflow

    if "MLFLOW_TRACKING_URI" not in os.environ:
        mlflow.set_tracking_uri((place.folder / "mlflow").absolute().as_uri())
    tracker = _accelerate("mlflow")(PROJECT, run_id=place.state.get("id"), run_name=place.run)
    tracker.start()
    if not place.state.get("id"):
        place.state["id"] = tracker.tracker.info.run_id
        tracker.store_init_configuration(flat(place.sections))
    return tracker


def show_tensorboard(tracker: Any, name: str, file: Path, step: int) -> None:
    with Image.open(file) as image:
        pixels = np.asarray(image.convert("RGB"))[None]  # (1, H, W, 3)
    tracker.log_images({name: pixels}, step=step, dataformats="NHWC")
    tracker.tracker.flush()


def show_wandb(tracker: Any, name: str, file: Path, step: int) -> None:
    with Image.open(file) as image:
        tracker.log_images({name: [image.convert("RGB")]}, step=step)


def show_trackio(tracker: Any, name: str, file: Path, step: int) -> None:
    import trackio

    tracker.log({name: trackio.Image(str(file))}, step=step)


def show_mlflow(tracker: Any, _name: str, file: Path, _step: int) -> None:
    tracker.log_artifact(str(file), "pictures")  # its name holds the step


KINDS = {
    "tensorboard": Kind(open_tensorboard, show_tensorboard, takes_back=True),
    "wandb": Kind(open_wandb, show_wandb),
    "trackio": Kind(open_trackio, show_trackio),
    "mlflow": Kind(open_mlflow, show_mlflow),
}


def flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A recipe with dotted keys and plain values, addresses without userinfo and query."""
    found: dict[str, Any] = {}
    for key, value in plainly(section).items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        elif value is not None:
            found[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return found


def plainly(value: Any) -> Any:
    """The same value with every address in it as messages show it: what a tracker may keep."""
    if isinstance(value, dict):
        return {key: plainly(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plainly(inner) for inner in value]
    return redact(value) if isinstance(value, str) else value


def _new_id(place: Place) -> bool:
    """Give the run an identity in this tracker, if it has none. Returns whether it had none."""
    if place.state.get("id"):
        return False
    place.state["id"] = uuid.uuid4().hex[:8]  # of the system's randomness: the run's own draws stay as they are
    return True


def _accelerate(name: str) -> Any:
    return LOGGER_TYPE_TO_CLASS[name]
