"""An OpenAI-compatible server over this project's own model and sampler."""
