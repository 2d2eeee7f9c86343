"""What a recipe takes in memory, FLOPs and hours, without running it."""
