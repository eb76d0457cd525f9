"""What may stand for a weight: an array, a LoRA beside one, eight bits."""
