"""The engine: claims work, replays, runs steps, commits. The same code under every executor."""
