"""Version of the pack; a test checks that it equals the version in pyproject.toml."""

VERSION = "0.1.0"
