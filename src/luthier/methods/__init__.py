"""Every method of the literature, one file each, in a folder per axis."""
