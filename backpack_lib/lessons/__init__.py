"""What every notebook shares."""
