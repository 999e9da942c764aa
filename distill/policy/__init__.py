"""Models on a mesh: found, described, loaded, applied, exported."""
