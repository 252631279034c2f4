"""What happens between a restored state and the first step."""
