"""F2: what a transformer is. The only floor that imports Flax."""
