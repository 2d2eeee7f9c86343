"""A run that is stopped goes on where it was.

checkpoints/last.ckpt      what the same command goes on from
checkpoints/previous.ckpt  the one before, where the last one is damaged
checkpoints/best.ckpt      weights of the best validation
checkpoints/*.partial      what a killed save left; the next one removes it
"""

from lightning_modules.checkpoint.callbacks import BestCheckpoint, LastCheckpoint
from lightning_modules.checkpoint.whole import newest_whole

__all__ = ["BestCheckpoint", "LastCheckpoint", "newest_whole"]
