"""Executing code objects: executable memory, aligned buffers, and the call. Knows nothing of kernels, passes or frontends."""
