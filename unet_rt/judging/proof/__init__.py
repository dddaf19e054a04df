"""What a machine can show of itself: sections that measure, each in a process of its own, and one report."""
