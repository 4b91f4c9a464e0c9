"""What is timed, how, and how the result is told."""
