"""What each member and the proxy said of every token of an answer, and what the proxy changed."""
