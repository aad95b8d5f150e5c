"""Pictures from a model and a file of prompts."""
