"""Everything that only a GPU can show, in three calls of ten minutes (benchmarks/gpu.sh)."""
