"""Methods of this axis; each file registers itself."""
