"""Corpora of text and images: how they are stored, and images on their way to patches."""
