"""What the demo does: real data made on this machine, a small model trained on it, and what it learned, shown."""
