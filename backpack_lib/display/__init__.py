"""What notebooks show: figures, tables and explorers, with no maths of their own."""
