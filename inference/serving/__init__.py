"""`tokenloom serve`: HTTP access to a model: OpenAI's images API, health, metrics and a page."""
