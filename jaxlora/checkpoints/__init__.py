"""F3: files in and out: model folders, adapters, training states, output folders."""
