"""The demo: small models trained with a ranking loss and, alike, without.

Run it with ``python -m proxy_losses.demo`` (or ``proxy-losses-demo``), and
``python -m proxy_losses.demo retrieval`` for embeddings; ``--help`` lists the flags. It needs the
``demo`` extra.
"""
