"""Checks this machine: ``python -m proxy_losses.doctor``."""
