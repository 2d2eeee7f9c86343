"""A light program that behaves like ropelab-train and starts in half a second. It counts."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from experiments import CONFIG_DIR, launcher  # noqa: F401 - Hydra knows launchers and `run_name`
from experiments.run import lock
from experiments.run.process import leave, process_rank

#: As in `experiments.start`.
JOB_IMPORTS = os.environ.get("LIGHT_IMPORTS", "").split()

received: list[int] = []


def count(config: DictConfig, folder: Path) -> None:
    """Counts each step once over all starts, as a resumed run does."""
    steps = folder / "steps.txt"
    done = len(steps.read_text().split()) if steps.is_file() else 0
    for step in range(done, config.steps):
        time.sleep(config.step_s)
        with steps.open("a") as file:
            file.write(f"{step}\n")
        if received:
            name = signal.Signals(received[0]).name
            sys.exit(130 if name == "SIGINT" else leave(name, process_rank()))


def has_terminal() -> bool:
    """Returns whether something here could ask: on stdin, or on the terminal like `getpass`."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        return os.isatty(0)
    return True


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="light")
def main(config: DictConfig) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: config.stubborn or received.append(number))
    folder = Path(config.paths.run)
    start = {"time": time.time(), "pid": os.getpid(), "gpus": os.getenv("CUDA_VISIBLE_DEVICES")}
    start |= {"terminal": has_terminal(), "parent": os.getppid()}
    start |= {key: value for key, value in os.environ.items() if key.startswith("SLURM_")}
    with (folder / "starts.jsonl").open("a") as file:
        file.write(json.dumps(start) + "\n")
    try:
        lock.take(folder)
    except ValueError as error:
        sys.exit(f"error: {error}")
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
    if config.seed in config.fails:
        sys.exit("error: asked to fail")
    count(config, folder)
    print(f"counted {config.steps}")
    done = {"metrics": {"score": float(config.seed)}, "time": time.time()}
    (folder / "done.json").write_text(json.dumps(done))


if __name__ == "__main__":
    main()
