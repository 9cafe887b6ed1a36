"""Image files that carry their recipe: PNG, JPEG and WebP with prompt, seed and parameters."""
