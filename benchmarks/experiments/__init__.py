"""What proxy tuning does to answers: the experiments whose figures are published."""
