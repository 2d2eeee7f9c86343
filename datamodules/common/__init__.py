"""Functions that all three packages use, such as atomic writes.

They import nothing else of the project, and no torch.
"""
