"""Taking a model apart: one method a file."""
