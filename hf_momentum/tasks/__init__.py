"""What is trained on: tasks, their prompts, their data and their metrics."""
