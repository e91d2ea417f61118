"""Tasks on real data, and the race between optimizers. No part of the installed package."""
