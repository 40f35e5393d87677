"""The kernels, written once against the vector vocabulary. No instruction set is named here."""
