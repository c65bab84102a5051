"""The demo: one small model, trained once with a ranking loss and once without.

Run it with ``python -m proxy_losses.demo`` (or ``proxy-losses-demo``); ``--help``
lists the flags. It needs the ``demo`` extra: ``pip install "proxy-losses[demo]"``.
"""
