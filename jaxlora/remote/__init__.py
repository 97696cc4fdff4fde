"""F3, below its neighbours: files on object storage, through fsspec."""
