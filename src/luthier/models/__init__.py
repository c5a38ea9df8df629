"""Models on disk: looking at them, loading, saving, merging, model cards."""
