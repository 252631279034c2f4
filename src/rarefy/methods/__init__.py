"""The field's methods: one file each, short, in the words of its paper. What they share is in `rarefy.algorithms`."""
