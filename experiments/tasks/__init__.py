"""Data sets that need no download, small networks, and the module that trains them."""
