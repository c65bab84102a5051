"""Adapters to other libraries; each needs its own, which only its own file imports."""
