"""``ha-watchdog``: notices, tells and repairs, also when no application runs (DESIGN.md 6)."""
