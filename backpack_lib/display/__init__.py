"""What notebooks show: tables and explorers, with no maths of their own."""
