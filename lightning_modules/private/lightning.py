"""Private names of Lightning."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch.distributed.device_mesh import DeviceMesh


def kill_other_ranks(trainer: Trainer) -> None:
    """Kills the ranks that this process has started, if Lightning has started any."""
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        launcher.kill(9)


def validation_is_next(trainer: Trainer) -> bool:
    """Returns whether the trainer validates before the next batch; call it after a batch."""
    fetcher: Any = trainer.fit_loop._data_fetcher
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def accumulates(trainer: Trainer) -> bool:
    """Returns whether the last batch was not the end of an optimizer step."""
    return trainer.fit_loop._should_accumulate()


def begin_next_epoch(trainer: Trainer) -> None:
    """Makes a trainer that resumes at the end of an epoch begin the next one."""
    loop = trainer.fit_loop
    loop.epoch_progress.increment_completed()
    loop.reset_restart_stage()
    loop._restarting = loop.epoch_loop.restarting = False


def install_no_signal_handlers(trainer: Trainer) -> None:
    """Prevents Lightning from installing its own signal handlers."""
    connector: Any = trainer._signal_connector
    connector.register_signal_handlers = lambda: None


def set_device_mesh(module: LightningModule, mesh: DeviceMesh) -> None:
    """Sets the mesh of ranks, as a strategy does."""
    module._device_mesh = mesh
