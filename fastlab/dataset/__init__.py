"""Originals in, dataset directories out."""
