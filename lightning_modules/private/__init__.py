"""Private names of other libraries: one module for each library.

Only these modules use them. A test for each name says what breaks when it goes. What programs use
is in `experiments.private`.
"""
