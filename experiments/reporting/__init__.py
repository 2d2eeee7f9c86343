"""Makes tables and plots from run directories."""
