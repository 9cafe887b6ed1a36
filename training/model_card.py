"""The README.md of an exported model folder, with what the run knows about itself."""

from __future__ import annotations

from seq2seq import Seq2SeqConfig, TransformerConfig
from training.token_config import Seq2SeqRunConfig


def model_card(run: Seq2SeqRunConfig, model: TransformerConfig, rows: int, held_out_loss: float | None) -> str:
    """A model card in the Hub's form. Figures that were not measured are said to be so."""
    loss = "not measured" if held_out_loss is None else f"{held_out_loss:.4f} nats a token on `{run.data.validation_split}`"
    if isinstance(model, Seq2SeqConfig):
        family, layers = "An encoder-decoder transformer", f"{model.encoder_layers} + {model.decoder_layers}"
    else:
        family, layers = "A decoder-only transformer", f"{len(model.patterns(getattr(model, 'layers', 0)))}"
    return f"""---
library_name: tokenloom
pipeline_tag: text-to-image
---

# Text-to-image model

{family} over the codes of an image tokenizer, trained with Tokenloom.

| | |
|---|---|
| training pictures | {rows:,} (`{run.data.path}`, split `{run.data.split}`) |
| steps x batch | {run.train.steps:,} x {run.train.batch_size} |
| code grid, codebook | {model.grid[0]} x {model.grid[1]}, {model.codebook_size} |
| transformer | {layers} layers, width {model.width} |
| held-out loss | {loss} |

```python
from tokenloom import TextToImage

model = TextToImage.from_pretrained("path/to/this/folder")
model.generate("a red heart", num_images=4, seed=0).images[0].save("heart.png")
```

The pictures follow the training data in content, style and bias. The licence of the training pictures applies to them
and to this model: see the attribution beside the data.
"""
