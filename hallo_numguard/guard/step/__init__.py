"""What is noted of a step while it runs."""
