"""The text of a configuration file: from YAML to plain data and back to a line, with single values changed."""
