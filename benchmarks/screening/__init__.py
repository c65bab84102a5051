"""Ranking losses in virtual screening: which few molecules of a library are tested first?"""
