"""Models on a mesh: resolving names, loading, applying and exporting."""
