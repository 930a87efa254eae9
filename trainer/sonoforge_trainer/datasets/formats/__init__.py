"""Readers of the few file formats that public sets use and Pillow does not read."""
