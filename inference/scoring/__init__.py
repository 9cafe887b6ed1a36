"""Image-text scores: our matcher, CLIP and SigLIP, reranking of candidates."""
