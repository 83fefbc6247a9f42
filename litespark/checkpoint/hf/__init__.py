"""Exchange with Hugging Face: one table per model family, and the export that reads it."""
