"""Puts visual tokens among the words of a row.

Tiles of one picture become one visual, and rows may be packed.
"""
