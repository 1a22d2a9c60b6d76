"""``StructuralConfig``: the options of structural self-supervised objectives."""

from __future__ import annotations

from typing import Literal

from unmask import config as configs
from unmask.config import Field
from unmask.systems.language.encoder import EncoderConfig
from unmask.systems.language.structural_ssl.joint import JointConfig
from unmask.systems.language.structural_ssl.pairs import PairConfig
from unmask.systems.language.structural_ssl.tokens import MaskingConfig

TOKENS = ("mlm", "slm", "rts", "crts", "electra")
Objective = Literal["mlm", "slm", "rts", "crts", "electra", "ssp", "sp", "psd", "all", "sdc", "ddc", "dslc", "mspp"]


class ClusterConfig(configs.Config):
    """C-RTS's clusters of tokens."""

    count: int = Field(100, ge=1, description="clusters")
    beta: float = Field(2.0, ge=0, description="how sharply pairs that fool the model are preferred")
    official_normalisation: bool = Field(False, description="counts as the authors' code normalises them")
    update_only_changed: bool = Field(True, description="only tokens that were really changed are counted")
    cluster_from: str | None = Field(
        None, description="a folder whose word table is clustered; open: vectors counted in the text"
    )
    map: str | None = Field(None, description="a JSON list of the cluster of each token")


class GeneratorConfig(configs.Config):
    """ELECTRA's generator."""

    share: float = Field(0.5, gt=0, le=1, description="of the width, heads and MLP")
    depth: int | None = Field(None, ge=1, description="blocks; open: as many")
    tie: Literal["words", "embeddings", "none"] = Field("words", description="which tables both networks share")

    def sizes(self, full: EncoderConfig) -> EncoderConfig:
        """Those of the generator beside a discriminator of these; the word tables are of equal width."""
        heads = max(round(full.num_heads * self.share), 1)
        return full.model_copy(
            update={
                "embed_dim": max(round(full.embed_dim * self.share) // heads, 1) * heads,
                "num_heads": heads,
                "mlp_dim": max(round(full.mlp_dim * self.share), 1),
                "depth": self.depth or full.depth,
            }
        )


class FewLabels(configs.Config):
    """Fine-tuning on few labelled pairs before ranking, when the system is measured."""

    pairs: int = Field(
        0, ge=0, description="labelled pairs of the training text; 0: none, the pair head is taken as it is"
    )
    steps: int = Field(60, ge=1, description="steps")
    batch_size: int = Field(32, ge=2, description="pairs a step")
    lr: float = Field(5e-4, gt=0, description="learning rate, linear to 0")


class StructuralConfig(configs.Config):
    """What is asked of the text, and of which network."""

    objective: Objective = Field("ssp", description="of tokens: mlm slm rts crts electra; of structure: all others")
    token: Literal["mlm", "slm", "rts", "crts", "electra", "none"] = Field(
        "mlm", description="the objective of tokens beside one of structure"
    )
    encoder: EncoderConfig = Field(EncoderConfig(), description="the network; size=tiny ... large")
    init: str | None = Field(
        None, description="a folder of transformers (BERT, RoBERTa, ELECTRA) or a run to go on from"
    )
    masking: MaskingConfig = Field(MaskingConfig(), description="which tokens are chosen")
    pairs: PairConfig = Field(PairConfig(), description="how pairs are made")
    joint: JointConfig = Field(JointConfig(), description="mspp: slots and candidates")
    clusters: ClusterConfig = Field(ClusterConfig(), description="crts")
    generator: GeneratorConfig = Field(GeneratorConfig(), description="electra")
    token_weight: float = Field(1.0, ge=0, description="of the token loss")
    pair_weight: float = Field(1.0, ge=0, description="of the structural loss")
    discriminator_weight: float = Field(50.0, ge=0, description="of electra's discriminator")
    count_padding: bool = Field(False, description="rts: padding counts as unswapped, as the authors' code has it")
    pair_head: Literal["", "bert", "roberta", "electra"] = Field("", description="its form; open: the encoder's family")
    labels: int = Field(2, ge=2, description="classes of pairs and candidates")
    few_labels: FewLabels = Field(FewLabels(), description="fine-tuning before ranking, when measured")
    special: dict[str, int] = Field({}, description="ids of pad, cls, sep, mask, unk; from the data")


class Ask(configs.Config):
    """What to score sentences by."""

    query: str = Field("", description="a sentence that all are compared with; empty: the rest of their paragraph")
