"""What a fuser does to a cache and to the answers: `c2c analyze` (docs/analysis.md)."""
