"""Callbacks for training frameworks; each file needs its own extra."""
