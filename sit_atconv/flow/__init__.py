"""Flow matching: torch and torchdiffeq alone, networks as callables. t = 0 is noise, t = 1 is data."""
