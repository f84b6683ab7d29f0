"""aria_train: pre-trains Aria, a multimodal mixture-of-experts model, through its four stages."""

__version__ = "0.1.0"
