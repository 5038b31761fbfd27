"""One script per question: the time and memory of proxy tuning, compared with other ways."""
