"""Prompts to pictures: a released model or a trained one, one sampler."""
