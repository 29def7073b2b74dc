"""Doors to the storage backends; each module re-exports one plugin's public names."""
