"""x86-64: one table of encodings, an encoder that works on whole columns, and the lowering of the vector vocabulary."""
