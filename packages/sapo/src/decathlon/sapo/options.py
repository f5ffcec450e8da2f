"""Options of the commands, but for `train`, whose options are fields of trl's and transformers' configurations."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class PrepareConfig:
    """Options of `prepare`: `prepare MODEL OUTPUT`."""

    model: str
    """A folder of save_pretrained, or an id of the hub."""
    output: str
    """Folder for the copy."""
    chat_template: str = "chatml"
    """chatml, zephyr, or a .jinja file that needs no new tokens."""
    revision: str = "main"
    """Branch, tag or commit of a model of the hub."""


@dataclass
class ReportConfig:
    """Options of `report`: `report RUN`."""

    run: str | None = None
    """Folder of a training; without one the paper's figures alone are shown."""
    model: str | None = None
    """Which model of the paper to set it beside; by the settings of the run if not given."""
    method: str | None = None
    """Which method of the paper; by the settings of the run if not given."""
    figures: str | None = None
    """JSON file of the paper's figures, for those who have the paper: {"Mistral-7B/SAPO-DPO/GSM8K": 12.3, ...}."""
    judged: str | None = None
    """JSON file of figures of the run that come from no harness: {"MT-Bench": 1.2, "AlpacaEval 2.0": 3.4}."""
