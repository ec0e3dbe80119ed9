"""What every module made of what it was given: hooks, and the frames that they record."""
