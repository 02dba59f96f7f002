"""The mathematics: from base and factors to the adapted weight. Knows no module, no file."""
