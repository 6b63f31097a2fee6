"""CMU-MOSI: opinions on films, each video a monologue, sentiment scores (arXiv 1606.06259)."""
