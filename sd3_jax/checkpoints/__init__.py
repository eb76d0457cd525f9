"""Steps that are saved whole, and proven so on the way back."""
