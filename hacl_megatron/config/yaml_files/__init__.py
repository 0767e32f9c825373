"""YAML: read as text with its faults named, and as the values that a configuration takes."""
