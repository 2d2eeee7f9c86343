"""Pixels: images, videos and folders of frames become uint8 frames.

Here stands what a file may claim before it costs memory or time.
"""
