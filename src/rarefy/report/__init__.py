"""What a run left behind, to look at."""
