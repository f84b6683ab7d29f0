"""Paired measurements of aria_train beside its peers and beside what the machine can do."""
