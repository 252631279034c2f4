"""The same task with each library: what is between the two marks is what a user would have to write."""
