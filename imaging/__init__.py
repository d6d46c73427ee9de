"""Images: files, formats, metrics, comparisons, the published and the generated sets."""
