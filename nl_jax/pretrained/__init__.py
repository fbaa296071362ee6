"""Pretrained Transformers from Hugging Face's format, and back."""
