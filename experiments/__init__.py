"""Scripts a person runs: training, prediction, the lecture's pictures and the benchmarks."""
