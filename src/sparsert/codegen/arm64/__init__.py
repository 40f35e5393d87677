"""AArch64 with NEON: a table of encodings, an encoder for whole columns, the lowering of the vector vocabulary."""
