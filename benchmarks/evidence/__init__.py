"""Does it communicate? Worlds in which that can be counted: trained, asked, timed and reported.

`python -m benchmarks.evidence` from the repository's root; docs/evidence.md is what comes of it.
"""
