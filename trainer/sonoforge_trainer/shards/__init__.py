"""Data sets as WebDataset tars with a manifest: building, checking, reading, and drawing phantoms."""
