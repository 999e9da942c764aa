"""From a config to updated weights."""
