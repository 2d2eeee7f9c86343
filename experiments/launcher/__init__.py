"""Hydra launchers, chosen by `launcher=`. They run each job of a multirun as its own process."""

from hydra.core.plugins import Plugins

from experiments.command import names  # noqa: F401 - registers resolvers of the configs
from experiments.directory import location  # noqa: F401 - registers `${run_name:}`
from experiments.launcher.listing import ListingSweeper, take_dry_run  # noqa: F401 - for programs
from experiments.launcher.local import LocalLauncher
from experiments.launcher.slurm import SlurmLauncher

# Hydra accepts plugins only from the package `hydra_plugins`, so these get names in that package.
for _class in (LocalLauncher, SlurmLauncher, ListingSweeper):
    Plugins.instance().class_name_to_class[f"hydra_plugins.ropelab.{_class.__name__}"] = _class
