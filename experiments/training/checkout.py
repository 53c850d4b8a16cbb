"""Where this checkout and its recorded results lie; imports nothing of ours, so that all may."""

from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
RESULTS = CHECKOUT / "experiments/results"
# The documents beside the results that show recorded rows.
DOCUMENTS = (CHECKOUT / "README.md", CHECKOUT / "experiments/MESH.md")
