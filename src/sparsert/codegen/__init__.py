"""From an ISA-independent vector program (columns, not objects) to the bytes of a code object.

Each ISA has a folder of its own; the folders know nothing of each other.
"""
