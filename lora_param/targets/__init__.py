"""Which weights: text → `Pattern` → `Plan`, over names and shapes alone. Pure; knows no torch."""
