"""Corpora and images: preparing them, reading them, and packing them into micro-batches."""
