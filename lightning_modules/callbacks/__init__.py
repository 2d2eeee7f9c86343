"""What runs beside a training: logs, guards, status files."""
