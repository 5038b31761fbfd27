"""What each member and the proxy predicted for every token, and what the proxy changed."""
