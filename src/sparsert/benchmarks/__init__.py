"""Benchmarks of single layers: named problems, dense and sparse peers, interleaved timing, tables and charts.

Data flows problems -> (peers, ours) -> runner -> report -> table, chart; peers' packages are imported on use only.
"""
