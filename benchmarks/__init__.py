"""Measurements of this library and its peers; run one with ``python -m benchmarks.<suite>``."""
