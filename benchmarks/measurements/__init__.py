"""One script a question: what proxy tuning takes in time and memory, beside other ways."""
