"""The HTTP server: OpenAI's Images API in front of one thread that paints batches."""
