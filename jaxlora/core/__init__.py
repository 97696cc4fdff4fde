"""F0: words every floor shares (errors, tree paths, axis names). Imports nothing of jaxlora."""
