"""First stages: pixels, our tokenizer and autoencoder, and diffusers' autoencoder, behind one interface."""

from unmask.systems.generation.first_stage.stage import FirstStage, FirstStageConfig, open_first_stage

__all__ = ["FirstStage", "FirstStageConfig", "open_first_stage"]
