"""What attends a run: its status, signals, time limits and watchdog, agreed on by all ranks."""
