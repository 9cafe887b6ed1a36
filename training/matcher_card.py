"""The README.md of an exported matcher, with what the run knows about itself."""

from __future__ import annotations

from typing import Any

from inference.matcher import MatcherConfig
from training.matcher_config import MatcherRunConfig


def matcher_card(run: MatcherRunConfig, model: MatcherConfig, rows: int, retrieval: dict[str, Any] | None) -> str:
    """A model card in the Hub's form. Figures that were not measured are said to be so."""
    found = "not measured"
    if retrieval is not None:
        found = (f"{retrieval['top1']:.3f} (chance {retrieval['chance_top1']:.3f}), top 5: {retrieval['top5']:.3f}, on "
                 f"`{run.data.validation_split}`")
    objective = "contrastive" + (f", and masked words (weight {run.loss.mlm_weight})" if run.loss.mlm_weight else "")
    split = f", split `{run.data.split}`" if run.data.split else ""
    return f"""---
library_name: tokenloom
pipeline_tag: zero-shot-image-classification
---

# Matcher: how well a caption fits a picture

A small contrastive image-text model, trained with Tokenloom. It knows its own training pictures' world and nothing else.

| | |
|---|---|
| training pictures | {rows:,} (`{run.data.path}`{split}) |
| steps x batch | {run.train.steps:,} x {run.train.batch_size} |
| objective | {objective} |
| pictures | {model.image.resolution} px |
| text tower | {model.text.layers} layers, width {model.text.width} |
| picture -> its caption among {retrieval['captions'] if retrieval else 'many'} | {found} |

```python
from tokenloom import TextToImage, load_matcher

matcher = load_matcher("path/to/this/folder")
matcher.scores([picture], ["a red heart", "a blue circle"])  # cosine similarity [1, 2]

model = TextToImage.from_pretrained("path/to/a/model", matcher="path/to/this/folder")
model.generate("a red heart", num_images=1, rerank_from=8)
```

Scores compare captions of one picture, or pictures of one caption; they are no probabilities. The bias of the training
pictures and captions is in them.
"""
