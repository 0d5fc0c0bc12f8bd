"""One thin file for each of vLLM's attention backends; what they have in common is in `builder` and `compaction`."""
