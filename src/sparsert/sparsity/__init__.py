"""Where a layer's nonzeros are: patterns, the table of taps lowered from them, and how rows are grouped.

Nothing here knows an instruction set; nothing here computes a product.
"""
