"""Private names of wandb-workspaces."""

import json
from typing import Any


def as_plain(workspace: Any) -> dict[str, Any]:
    """Returns a workspace as plain containers: what W&B stores of a view."""
    return json.loads(workspace._to_model().model_dump_json())


def take_place_of(workspace: Any, saved: dict[str, Any]) -> None:
    """Gives a workspace the name and id of a saved one, so that it replaces that view."""
    workspace._internal_name, workspace._internal_id = saved["name"], saved["id"]
