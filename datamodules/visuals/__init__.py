"""Reads images, videos and folders of frames as uint8 frames.

The modules here also limit the memory and time that a file can cost.
"""
