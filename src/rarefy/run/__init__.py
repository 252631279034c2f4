"""From a YAML file to a trainer."""
