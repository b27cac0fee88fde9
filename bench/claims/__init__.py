"""What the source documents claim, one TOML file each, and the checks that measure it."""
