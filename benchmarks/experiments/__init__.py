"""What proxy tuning does to answers, with figures that are published."""
