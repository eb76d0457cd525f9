"""Parameter tree to parameter tree: published files to ours, and back."""
