"""hagroup."""
