"""Long trials of what the tests show in short: real processes, real kills, real damage."""
