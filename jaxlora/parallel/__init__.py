"""F3: devices. Builds the mesh and says where every array lives."""
