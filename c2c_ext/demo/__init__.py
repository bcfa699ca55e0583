"""A pair of tiny models, its fuser and the world they speak about: real transfer in seconds."""
