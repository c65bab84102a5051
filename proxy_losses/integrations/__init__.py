"""Adapters to other libraries; each file needs its own extra."""
