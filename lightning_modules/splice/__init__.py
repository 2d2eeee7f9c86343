"""Places visual tokens between the text tokens of a row.

The tiles of one image become one visual. Samples may be packed into shared rows.
"""
