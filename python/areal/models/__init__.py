"""Hugging Face decoder-only models with areal's attention: packed for training, slot-based for generation."""
