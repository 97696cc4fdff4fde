"""F4: one run on other machines: scripts and manifests for them, and processes on this one."""
