"""Checks that W&B has an API key before jobs start, because jobs cannot ask for one."""

import os
import subprocess
import sys
from typing import Any

from experiments.launcher.job import Job

_LOGGER = "ResumableWandbLogger"
_ASK = """
import sys, wandb
try:
    sys.exit(0 if wandb.login(prompt=False, verify=False) else 3)
except wandb.errors.Error as error:
    sys.exit(f"why: {error}")
"""


def check_key(jobs: list[Job]) -> None:
    """Checks that W&B has an API key, if a job logs online.

    W&B looks for it in a separate process: in the environment, netrc, its settings and an identity
    token, for the server in WANDB_BASE_URL or the settings. The key is not verified with the
    server, and PyTorch is not imported.

    Raises:
        ValueError: there is no key, or it is malformed.
    """
    if not any(map(_logs_online, jobs)):
        return
    environment = {**os.environ, "WANDB_MODE": "online", "WANDB_SILENT": "true"}
    asked = subprocess.run(
        [sys.executable, "-c", _ASK],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    why = next((line[5:] for line in asked.stderr.splitlines() if line.startswith("why: ")), None)
    if asked.returncode == 3 or why:
        raise ValueError(
            f"W&B has no key ({why or 'neither WANDB_API_KEY nor a login'}), and no job can ask "
            "for one: set WANDB_API_KEY or call wandb login, or keep the runs here with "
            "WANDB_MODE=offline"
        )


def _logs_online(job: Job) -> bool:
    loggers: Any = job.plain(job.config.get("logger")) or {}
    return any(
        isinstance(node, dict)
        and str(node.get("_target_", "")).endswith(f".{_LOGGER}")
        and node.get("mode") in (None, "online", "shared")
        for node in loggers.values()
    )
