"""`python -m app.cli` is `scaleout`, for whoever starts our processes with an interpreter of their own."""

from app.cli import main

main()
