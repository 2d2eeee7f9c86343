"""Checkpoints: a stopped run resumes where it was.

checkpoints/last.ckpt      the checkpoint from which the same command resumes
checkpoints/previous.ckpt  the one before, used if the last one is damaged
checkpoints/best.ckpt      weights of the best validation
checkpoints/*.partial      left by a killed save; the next save removes it
"""

from lightning_modules.checkpoint.callbacks import BestCheckpoint, LastCheckpoint
from lightning_modules.checkpoint.whole import newest_whole

__all__ = ["BestCheckpoint", "LastCheckpoint", "newest_whole"]
