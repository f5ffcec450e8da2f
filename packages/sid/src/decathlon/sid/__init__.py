"""Score identity Distillation: one-step generators from diffusion models, without data (arXiv 2404.04057)."""
