"""What is checked of a command before anything is written."""
