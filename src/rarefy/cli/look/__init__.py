"""The commands that show instead of train: inspect, plot, report, compare."""
