"""Text in, tokens out, and texts written by a model."""
