"""What is kept of runs and how it is shown."""
