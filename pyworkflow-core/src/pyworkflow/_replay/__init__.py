"""Replay: history in, commands out. Pure and sans-IO; nothing here knows storage or clocks."""
