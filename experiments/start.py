"""ropelab-train: where the program begins, before the seconds that importing PyTorch takes.

A multirun only needs Hydra here, since every job is a process of its own. A run that is told to go
while it starts has nothing to save, and leaves like one that has.
"""

import os
import sys
from typing import Any

import hydra

from experiments import CONFIG_DIR, launcher
from experiments.run.hydra_errors import hydra_errors_in_one_line
from experiments.run.process import leave_on_signals, run_alone


def main() -> None:
    if launcher.take_dry_run(sys.argv) or {"-m", "--multirun"} & set(sys.argv[1:]):
        run_alone("ropelab-train -m")
        hydra_errors_in_one_line(sweep)()
        return
    leave_on_signals()
    leave_terminal_to_the_foreground()
    from experiments.train import main as train

    hydra_errors_in_one_line(train)()


def leave_terminal_to_the_foreground() -> None:
    """Takes the terminal away from a process in the background (`ropelab-train … &`).

    Whoever asks there, as W&B does for a key, would be stopped until somebody notices. So it is
    told in one line instead that there is no key.
    """
    if sys.stdin is not None and sys.stdin.isatty() and os.tcgetpgrp(0) != os.getpgrp():
        sys.stdin = open(os.devnull)  # noqa: SIM115 - as long as the process lives


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="train")
def sweep(config: Any) -> None:
    raise NotImplementedError("a job of a multirun is a process of its own")


if __name__ == "__main__":
    main()
