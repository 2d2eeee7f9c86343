"""Entry point of ropelab-train. It runs before PyTorch is imported, which takes seconds.

A multirun needs only Hydra here, because every job is a process of its own. A run that receives a
stop signal while it starts has nothing to save. It exits as a run that has saved does.

This is no part of `train.py`, because that module imports PyTorch at its head, like every recipe.
In one module, all imports of the recipe would have to hide in its functions.
"""

import gc
import os
import sys
from typing import Any

import hydra

from experiments import CONFIG_DIR, launcher
from experiments.run.hydra_errors import hydra_errors_in_one_line
from experiments.run.process import leave_on_signals, run_alone

#: What every job imports after this module: the jobs of a multirun share these imports.
JOB_IMPORTS = ("experiments.train", "transformers", "wandb.apis.public")

#: Options of Hydra that print something and train nothing.
_SHOW = {"-h", "--help", "--hydra-help", "--version", "-c", "--cfg", "-i", "--info"}


def main() -> None:
    if _SHOW & {word.partition("=")[0] for word in sys.argv[1:]}:
        hydra_errors_in_one_line(sweep)()
        return
    if launcher.take_dry_run(sys.argv) or {"-m", "--multirun"} & set(sys.argv[1:]):
        run_alone("ropelab-train -m")
        hydra_errors_in_one_line(sweep)()
        return
    leave_on_signals()
    leave_terminal_to_the_foreground()
    gc.disable()  # hardly anything that is imported becomes garbage, and looking for it takes long
    from experiments.train import main as train

    gc.freeze()  # nor is it looked for there later
    gc.enable()
    hydra_errors_in_one_line(train)()


def leave_terminal_to_the_foreground() -> None:
    """Detaches standard input from the terminal in a background process (`ropelab-train … &`).

    The system stops a background process that reads from the terminal, and nobody may notice. W&B
    reads a key there. Without the terminal it reports the missing key in one line instead.
    """
    if sys.stdin is not None and sys.stdin.isatty() and os.tcgetpgrp(0) != os.getpgrp():
        sys.stdin = open(os.devnull)  # noqa: SIM115 - as long as the process lives


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="train")
def sweep(config: Any) -> None:
    raise NotImplementedError("each job of a multirun is its own process")


if __name__ == "__main__":
    main()
