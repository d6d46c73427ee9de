"""Image files, formats and metadata, metrics, comparison pictures, published and generated images."""
