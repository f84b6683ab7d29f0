"""Text corpora: Megatron's indexed files, tokenizers, and what is made of them."""
