"""The model: decoder, vision encoder, projector, and Hugging Face weights. Start reading at `aria.py`."""

from aria_train.model.aria import AriaModel, AriaOutput

__all__ = ["AriaModel", "AriaOutput"]
