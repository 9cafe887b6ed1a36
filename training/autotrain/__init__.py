"""`tokenloom train`: from a folder of captioned images to a model in one command."""
