"""Private names of other libraries that programs use: one module for each library.

`lightning_modules.private` has those that training uses, because it cannot import programs.
"""
