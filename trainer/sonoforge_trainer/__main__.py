"""`python -m sonoforge_trainer` is `sonoforge`, for places where the script is not on the path."""

from sonoforge_trainer.cli import main

main()
