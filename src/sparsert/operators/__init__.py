"""Compiled operators as the user holds them: array checks, views and copies around one product, native or NumPy."""
