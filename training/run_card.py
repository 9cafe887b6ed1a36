"""What every trained model's card says: the data, the recipe, the licence, as the run knows them."""

from __future__ import annotations

from typing import Any

from tokenloom_common.model_card import CardFacts, Measurement
from training.config.run import DataConfig, RunConfig
from training.data.origin import data_origin

NOT_LEARNED_FROM = ("run_dir", "card", "checkpoint", "log")
"""Sections of the config that say where a run was and how it was watched."""
LIMITS = ("The pictures follow the training data in content, style and bias. The licence of the training pictures may bind "
          "this model too.")


def run_card(run: RunConfig, data: DataConfig, rows: int, facts: tuple[tuple[str, str], ...],
             measured: tuple[tuple[str, str, float], ...], notes: str, **about: Any) -> CardFacts:
    """The facts of a run's card. rows: training pictures; facts: rows of the table that only this kind of model has;
    measured: name, the Hub's metric and value of what the held-out split said; about: further fields of CardFacts."""
    origin, start = data_origin(data.path), getattr(run, "init_from", None)  # a matcher begins from nothing
    split = f", split `{data.split}`" if data.split else ""
    train, optim = run.train, run.optim
    recipe = (("training pictures", f"{rows:,} (`{origin.name}`{split})"),
              ("steps x batch", f"{train.steps:,} x {train.batch_size}"),
              ("optimizer", f"{optim.name}, learning rate {optim.lr:g} ({optim.schedule}), weight decay "
                            f"{optim.weight_decay:g}"),
              ("seed", str(run.seed)), *((("begun with the weights of", f"`{start}`"),) if start else ()))
    config = {name: value for name, value in run.plain().items() if name not in NOT_LEARNED_FROM}
    return CardFacts(
        facts=(*recipe, *facts),
        measured=tuple(Measurement(*one, dataset=origin.name, split=data.validation_split) for one in measured),
        license=run.card.license, data_license=origin.license, attribution=origin.attribution,
        datasets=(origin.hub_id,) if origin.hub_id else (),
        notes=f"{notes}\n\n{run.card.notes}" if run.card.notes else notes, config=config, **about)
