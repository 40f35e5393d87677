"""Executing code objects: executable memory, aligned buffers, the call. Knows no kernels, passes or frontends."""
