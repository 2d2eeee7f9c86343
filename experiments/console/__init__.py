"""What ropelab-train and ropelab-evaluate print: a summary at the start, results at the end.

The lines in between come from `lightning_modules/loggers/progress.py`.
"""
