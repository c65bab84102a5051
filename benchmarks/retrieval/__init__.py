"""Embeddings of a frozen encoder, mapped so that rows of classes never seen find each other."""
