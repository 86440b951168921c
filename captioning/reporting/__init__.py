"""What the report stage computes and writes: leaderboard, provenance, Markdown and HTML."""
