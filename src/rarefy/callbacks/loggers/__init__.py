"""Where metrics go: one file a place."""
